"""``python -m benchmarks.gpu --out DIR``: build, test and measure on a GPU, the most important first.

Writes ``gpu.json``, ``gpu.md``, ``speed.png``, ``floors.png`` and ``log.txt`` into DIR, after every row anew, so that a
run that is cut keeps what it has. Needs torch with CUDA, Triton, a C++ compiler and pybind11, no network. ``--dry-run``
goes the same way on the CPU with tiny sizes, in Triton's interpreter when TRITON_INTERPRET=1 is set; no figure of it
means anything.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_processes import ROOT, Children, shares

ROUNDS = 9
# Seconds beyond the limit after which a run that does not come back, as from a kernel that hangs, is ended.
GRACE = 5
# Alternatives to what plans choose, measured on the first cases: each is an override of the plan of both passes.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"sync": "flags"},
    {"BB": 16, "BH": 16},
    {"BB": 32, "BH": 8},
    {"BB": 16, "BH": 8, "warps": 8},
    {"depth": 4},
    {"held": 0},
    {"regime": "step"},
)
WATCH = "tests/test_gpu_recurrence.py::test_nothing_hangs"


def varied(cases: Sequence[Any]) -> list[Any]:
    """The cases that :data:`VARIANTS` are measured on."""
    return [cases[0], cases[1], cases[8]]


class Run:
    """The results so far, where they go, and how long there is."""

    def __init__(self, folder: Path, limit: float, dry: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dry = folder, dry
        self.deadline = time.monotonic() + limit
        self.log_file: IO[str] = (folder / "log.txt").open("w", encoding="utf-8")
        self.results: dict[str, Any] = {
            "environment": {},
            "state": "Not finished",
            "tests": None,
            "rows": [],
            "clustering": [],
            "floors": [],
            "variants": [],
            "cuda": [],
            "sanitizer": {},
            "peers": [],
            "problems": [],
        }

    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic()

    def watch(self) -> None:
        """From another thread: ends the process, with the results so far, when it is still there past the limit."""
        self.watcher = threading.Timer(self.left() + GRACE, self.cut)
        self.watcher.daemon = True
        self.watcher.start()

    def cut(self) -> None:
        """Keeps what there is and ends the process at once: a kernel that hangs cannot be waited for."""
        self.results["state"] = f"Cut at the limit; tests: {self.results['tests']}"
        self.problem("still running past the limit")
        self.plot()
        os._exit(1)

    def plot(self) -> None:
        """The two plots of the results so far."""
        if importlib.util.find_spec("matplotlib") is None:
            self.problem("no plots: matplotlib is not installed")
            return
        from benchmarks import gpu_report

        guarded(self, "plots", lambda: gpu_report.plots(self.results, self.folder), float("-inf"))

    def log(self, text: str) -> None:
        """A line to the screen and to the log, with the time left."""
        line = f"[{self.left():6.1f} s left] {text}"
        print(line, flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()

    def problem(self, text: str) -> None:
        """Something went wrong; the rest goes on."""
        self.results["problems"].append(text.splitlines()[-1] if text else "?")
        self.log(f"PROBLEM: {text}")
        self.save()

    def save(self) -> None:
        """JSON and Markdown of what there is."""
        from benchmarks import gpu_report

        text = json.dumps(self.results, indent=1, ensure_ascii=False)
        (self.folder / "gpu.json").write_text(text, encoding="utf-8")
        (self.folder / "gpu.md").write_text(gpu_report.markdown(self.results), encoding="utf-8")

    def child(
        self, name: str, command: list[str], seconds: float, environment: dict[str, str] | None = None
    ) -> int | None:
        """Runs a command into the log; its exit status, or None when it took too long."""
        self.log(f"{name}: {' '.join(command)}")
        seconds = min(seconds, max(1.0, self.left()))
        (status,) = Children([command], environment).end(seconds, self.log_file)
        if status is None:
            self.problem(f"{name} did not end within {seconds:.0f} s")
        elif status:
            self.problem(f"{name} ended with status {status}: see log.txt")
        return status


def build(run: Run) -> None:
    """The package, editable, from what is installed here: nothing is fetched. The CUDA kernels where there is nvcc."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    command = [*pip, "--no-deps", "--editable", str(ROOT)]
    status = run.child("build", command, 250, {"FASTSEQ_CUDA": "auto"})
    if status != 0:  # with what CUDA C++ needs missing, the rest can still be measured
        run.child("build without CUDA C++", command, 200, {"FASTSEQ_CUDA": "0"})


def tests(run: Run) -> None:
    """The tests marked ``gpu``, in processes of their own that are killed when they hang: their kernels take longer to
    compile than to run, so several compile at once."""
    if importlib.util.find_spec("pytest") is None:
        run.results["tests"] = "not run: pytest is not installed"
        run.problem(run.results["tests"])
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=5", "-p", "no:cacheprovider"]
    files = ["tests/test_gpu_recurrence.py", "tests/test_gpu_clustering.py"]
    # First and alone, since programs that wait for ever would hold up all the others.
    if run.dry or run.child("deadlock watch", [*command, WATCH], 120) == 0:
        command += ["--deselect", WATCH, *files]
        commands = shares([*command[2:], "--share"], most=1 if run.dry else 8)
        run.log(f"tests: {len(commands)} processes: {' '.join(commands[0])}")
        statuses = Children(commands).end(min(200, run.left()), run.log_file)
        # 5 is pytest's word for "nothing selected": there is no GPU.
        words = {0: "passed", None: "did not end", 5: "none ran"}
        wrong = [status for status in statuses if status != 0]
        run.results["tests"] = words.get(wrong[0], "FAILED") if wrong else "passed"
    else:
        run.results["tests"] = "FAILED: see the deadlock watch"
    if run.results["tests"] not in ("passed", *(["none ran"] if run.dry else [])):
        run.problem(f"tests: {run.results['tests']}")
    from fastseq import cuda

    reason = cuda.why_unavailable("cuda")
    if reason is None:
        run.results["cuda_tests"] = marked_tests(run, "tests of CUDA C++", ["tests/test_gpu_cuda.py"], 120)
    else:
        run.results["cuda_tests"] = f"not run: {reason}"
    run.log(f"tests: {run.results['tests']}; of CUDA C++: {run.results['cuda_tests']}")
    run.save()


def marked_tests(run: Run, name: str, files: list[str], seconds: float) -> str:
    """How the tests marked ``gpu`` in some files went."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=5", "-p", "no:cacheprovider", *files]
    status = run.child(name, command, seconds)
    if status == 5 and run.dry:  # pytest's word for "nothing selected": there is no GPU
        run.results["problems"].pop()
    return {0: "passed", None: "did not end", 5: "none ran"}.get(status, "FAILED")


def sanitized(run: Run) -> None:
    """Every CUDA kernel once under compute-sanitizer, which finds bad accesses and races in shared memory."""
    from fastseq import cuda

    reason = cuda.why_unavailable("cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if reason is not None or tool is None:
        run.log(f"no compute-sanitizer run: {reason or 'it is not installed'}")
        return
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "3", sys.executable, "-m", "benchmarks.cuda_sanitized"]
        status = run.child(f"compute-sanitizer {check}", command, 90)
        run.results["sanitizer"][check] = {0: "clean", 3: "ERRORS", None: "did not end"}.get(status, "FAILED")


def measure_cuda(run: Run, device: Any, cases: list[Any]) -> None:
    """Adds the figures of the CUDA C++ kernels, while there is time."""
    from benchmarks import gpu_cuda
    from fastseq import cuda

    reason = cuda.why_unavailable(device.type)
    if reason is not None:
        run.log(f"no figures of the CUDA kernels: {reason}")
        return

    def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        return {name: spread(samples)["median"] for name, samples in interleaved(run, dict(calls)).items()}

    barriers = gpu_cuda.barriers(device, functools.partial(median_seconds, run))
    for name, value, unit in itertools.chain(barriers, gpu_cuda.layers(device, cases, medians)):
        run.results["cuda"].append({"name": name, "value": value, "unit": unit})
        run.log(f"{name}: {value:.3g} {unit}")
        run.save()
        if run.left() < 30:
            return


def seconds_of(run: Run, call: Callable[[], object]) -> float:
    """Seconds that one call takes, between two events of the GPU (in a dry run: by the clock)."""
    import torch

    if run.dry:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))


def median_seconds(run: Run, call: Callable[[], object]) -> float:
    """The median of several, after a call that is not timed."""
    call()
    rounds = 1 if run.dry else ROUNDS
    return sorted(seconds_of(run, call) for _ in range(rounds))[rounds // 2]


def interleaved(run: Run, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call in every round, in an order reversed from one round to the next."""
    for call in calls.values():
        call()
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(2 if run.dry else ROUNDS):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(seconds_of(run, calls[name]))
    return samples


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    from fastseq.cli.timing import quantiles

    found = quantiles(values)
    return {"median": found.median, "p20": found.p20, "p80": found.p80}


def measure(run: Run, pair: Any) -> None:
    """Verifies a pair, then adds a row for each mode."""
    from benchmarks.gpu_cases import MODES

    pair.precise()
    pair.verify()
    for mode in MODES:
        samples = interleaved(run, pair.calls(mode))
        ratios = [peer / ours for peer, ours in zip(samples["torch"], samples["fastseq"], strict=True)]
        ours = spread([1e3 * value for value in samples["fastseq"]])
        row = {
            "case": pair.case.name,
            "kind": pair.kind,
            "mode": mode,
            "torch_ms": spread([1e3 * value for value in samples["torch"]]),
            "fastseq_ms": ours,
            "ratio": spread(ratios),
            "microseconds_a_step": 1e3 * ours["median"] / pair.case.T / pair.case.layers,
            "plans": pair.plans(),
        }
        run.results["rows"].append(row)
        run.log(f"{row['case']} {row['kind']} {mode}: ratio {row['ratio']['median']:.2f}")
    run.save()


def guarded(run: Run, what: str, action: Callable[[], None], needs: float = 10) -> None:
    """Runs a part if there is time; a failure becomes a problem, and the rest goes on."""
    if run.left() < needs:
        run.log(f"no time for {what}")
        return
    try:
        action()
    except Exception:  # whatever it was, the figures that there are must be kept
        run.problem(f"{what}: {traceback.format_exc()}")


def benchmarks(run: Run) -> None:
    """The table: half types of every case, then float32, with the floors in between."""
    import torch

    from benchmarks.gpu_cases import CASES, KINDS, Pair, tiny

    device = torch.device("cpu" if run.dry else "cuda:0")
    implementation = "reference" if run.dry and os.environ.get("TRITON_INTERPRET") != "1" else "triton"
    cases = list(dict.fromkeys(tiny(case) for case in CASES)) if run.dry else list(CASES)

    def make(case: Any, kind: str) -> Callable[[], None]:
        return lambda: measure(run, Pair(case, kind, device, implementation))

    for kinds in (("float16", "bfloat16"), ("float32", "tf32")):
        for case in cases:
            for kind in kinds:
                # In the interpreter bfloat16 is wrong, and tf32 is float32; one case of that is enough there.
                if not run.dry or kind == "float16" or (kind == "float32" and case == cases[0]):
                    guarded(run, f"{case.name} {kind}", make(case, kind))
        if kinds[0] == "float16":
            guarded(run, "floors", lambda: measure_floors(run, device))
            guarded(run, "CUDA C++", lambda: measure_cuda(run, device, cases), 40)
            measure_clustering(run, device, implementation)
            guarded(run, "variants", lambda: measure_variants(run, cases, device, implementation), 60)
    assert set(KINDS) == {"float16", "bfloat16", "float32", "tf32"}
    guarded(run, "peers", lambda: measure_peers(run, cases, device), 60)


def measure_clustering(run: Run, device: Any, implementation: str) -> None:
    """Adds a row for each operation and shape of the clustering benchmark, each verified first."""
    from benchmarks.gpu_clustering import GPU_CASES, Row, rows, tiny

    def add(row: Row) -> None:
        samples = interleaved(run, row.calls)
        found = {name: spread([1e3 * value for value in values]) for name, values in samples.items()}
        floors = {"copy_ms": row.copy_ms, "arithmetic_ms": row.arithmetic_ms}
        run.results["clustering"].append({"case": str(row.case), "op": row.op, "ms": found, **floors})
        run.log(f"clustering {row.case} {row.op}: {found['fastseq']['median']:.3g} ms")
        run.save()

    def all_of(case: Any) -> Callable[[], None]:
        def measure_case() -> None:
            for row in rows(case, device, implementation):
                add(row)

        return measure_case

    for case in [tiny(GPU_CASES[0])] if run.dry else GPU_CASES:
        guarded(run, f"clustering {case}", all_of(case), 20)


def measure_floors(run: Run, device: Any) -> None:
    """Adds the floors."""
    from benchmarks.gpu_floors import floors

    for name, value, unit in floors(device, lambda call: median_seconds(run, call)):
        run.results["floors"].append({"name": name, "value": value, "unit": unit})
        run.log(f"{name}: {value:.3g} {unit}")
    run.save()


def measure_variants(run: Run, cases: list[Any], device: Any, implementation: str) -> None:
    """Other plans for the first shapes, in float16: what a better rule for choosing would start from."""
    from benchmarks.gpu_cases import Pair
    from fastseq.kernels import plan

    for case in cases[:1] if run.dry else varied(cases):
        pair = Pair(case, "float16", device, implementation)
        for fields in VARIANTS[-2:] if run.dry else VARIANTS:
            if run.left() < 40:
                return
            name = f"{case.name} training, " + ", ".join(f"{key} {value}" for key, value in fields.items())
            try:
                with plan.override(**fields):
                    value = 1e3 * median_seconds(run, pair.calls("training")["fastseq"])
            except Exception as error:  # a variant may not fit; that is a finding too
                run.log(f"{name}: {type(error).__name__}: {error}")
                continue
            run.results["variants"].append({"name": name, "value": value, "unit": "ms"})
            run.log(f"{name}: {value:.3g} ms")
        if not run.dry:
            measure_graph(run, case, device)
        run.save()


def measure_graph(run: Run, case: Any, device: Any) -> None:
    """A launch for every step without a graph and in one, which is the caller's to capture: its memory stays in use."""
    import torch

    from benchmarks.gpu_cases import Pair
    from fastseq.kernels import plan

    with plan.override(regime="step"):
        forward = Pair(case, "float16", device).calls("forward")["fastseq"]
        forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        for name, call in (("launched one by one", forward), ("in a graph", graph.replay)):
            value = 1e3 * median_seconds(run, call)
            row = {"name": f"{case.name} forward, regime step, {name}", "value": value, "unit": "ms"}
            run.results["variants"].append(row)
            run.log(f"{row['name']}: {value:.3g} ms")


def measure_peers(run: Run, cases: list[Any], device: Any) -> None:
    """torch.compile of the reference, which unrolls the loop, so only the shortest case; FlashRNN where installed."""
    import torch

    from benchmarks.gpu_cases import Pair, reference_of

    case = min(cases, key=lambda each: each.T)
    pair = Pair(case, "float16", device)
    if not run.dry:
        compiled = torch.compile(reference_of(pair))
        with torch.no_grad():
            value = 1e3 * median_seconds(run, lambda: compiled(pair.input))
        run.results["peers"].append(
            {"name": f"{case.name} forward, reference compiled by torch", "value": value, "unit": "ms"}
        )
    if importlib.util.find_spec("flashrnn") is None:
        run.log("FlashRNN is not installed")
        return
    from flashrnn import flashrnn

    first = cases[0]
    heads = torch.randn(4, 1, first.H, first.H, device=device, dtype=torch.bfloat16) / first.H**0.5
    sums = torch.randn(first.B, first.T, 4, 1, first.H, device=device, dtype=torch.bfloat16)
    bias = torch.zeros(4, 1, first.H, device=device, dtype=torch.bfloat16)
    value = 1e3 * median_seconds(run, lambda: flashrnn(sums, heads, bias, function="lstm", backend="cuda_fused"))
    run.results["peers"].append(
        {"name": f"{first.name} forward without input product, FlashRNN", "value": value, "unit": "ms"}
    )


def environment(run: Run) -> dict[str, str]:
    """Where the figures come from."""
    import torch
    import triton

    from fastseq.cli.bench.results import commit

    device = "CPU, dry run: no figure means anything" if run.dry else torch.cuda.get_device_name()
    return {
        "device": device,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "CUDA": str(torch.version.cuda),
        "commit": (commit() or "?")[:12],
    }


def main() -> int:
    """Everything; 0 when the tests passed and nothing went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for the results")
    parser.add_argument("--limit", type=float, default=530, help="seconds for everything (%(default)s)")
    parser.add_argument("--no-build", action="store_true", help="the package is installed")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny, to see that it works")
    args = parser.parse_args()
    run = Run(args.out, args.limit, args.dry_run)
    sys.path.insert(0, str(ROOT))
    run.watch()
    # Beside the build and the tests, which leave most cores idle.
    ahead = Children([] if args.dry_run else shares(["benchmarks.gpu_ahead"]))
    if not args.no_build:
        build(run)
    run.results["environment"] = environment(run)
    run.save()
    tests(run)
    ahead.end(60, run.log_file)
    if not run.dry:
        guarded(run, "compute-sanitizer", lambda: sanitized(run), 60)
    benchmarks(run)
    run.watcher.cancel()
    run.results["state"] = f"Tests: {run.results['tests']}; of CUDA C++: {run.results.get('cuda_tests', 'not run')}"
    run.save()
    run.plot()
    run.log("done")
    print((run.folder / "gpu.md").read_text(encoding="utf-8"))
    return 1 if run.results["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
