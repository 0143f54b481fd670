"""``python -m benchmarks.cuda_resources``: compiles every CUDA kernel for GPUs that are not there, prints what each
takes of one and writes the table to ``benchmarks/results/cuda_resources.md``. Needs nvcc. tests/test_cuda_compile.py
compiles the same and fails on a spill."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.md"
sys.path.insert(0, str(ROOT / "csrc"))

import cuda_build  # noqa: E402

from benchmarks.markdown import table  # noqa: E402

# A kernel's name as the compiler has it: length and name, the number type, and constants.
_NAME = re.compile(
    r"\d(lstm_cluster_\w+?|lstm_grid_\w+?|lstm_cell_\w+?|rnn_cell_\w+?)INS0_\d+(Bfloat16|Float16|Float32)E(.*?)EEv"
)
_CONSTANT = re.compile(r"L(?:i|b|NS0_12NonlinearityE)(\d+)E")
HIDDEN = (128, 256, 512, 640, 768)
GRID_HIDDEN = (1024, 2048)
GRID_BATCH = 16
LIMIT = 227 * 1024
_MEANING = {
    "lstm_cluster": ("blocks", "threads", "register tiles", "batch tiles", "flags"),
    "lstm_grid": ("groups", "flags"),
    "lstm_cell": ("numbers a thread",),
    "rnn_cell": ("numbers a thread", "nonlinearity"),
}


@dataclass(frozen=True)
class Kernel:
    """What one thread of a compiled kernel takes: registers, and bytes of local memory that it spills."""

    name: str
    dtype: str
    constants: tuple[int, ...]
    target: str
    registers: int
    spilled: int

    @property
    def described(self) -> str:
        """The constants that it was compiled for."""
        names = _MEANING["_".join(self.name.split("_")[:2])]
        return ", ".join(f"{value} {name}" for name, value in zip(names, self.constants, strict=False))


def compile_source(compiler: str, source: Path, target: str) -> list[Kernel]:
    """What the kernels of a file take of one target; warnings are errors.

    Raises:
        RuntimeError: it does not compile; the message has what the compiler printed.
    """
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        command = cuda_build.nvcc_command(compiler, source, Path(file.name), [target], werror=True)
        done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(told)
    return list(_kernels(told, target))


def _kernels(told: str, target: str) -> Iterable[Kernel]:
    for part in told.split("Compiling entry function '")[1:]:
        name = _NAME.search(part.split("'")[0])
        if name is None:  # the floor, which is a barrier and nothing else
            assert "cluster_barriers" in part.split("'")[0], part[:200]
            continue
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert stack is not None
        assert registers is not None
        constants = tuple(int(value) for value in _CONSTANT.findall(name[3]))
        yield Kernel(name[1], name[2].lower(), constants, target, int(registers[1]), max(map(int, stack.groups())))


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(argv)
    compiler = cuda_build.nvcc()
    if compiler is None:
        print("there is no nvcc", file=sys.stderr)
        return 1
    jobs = [(source, target) for source, targets in cuda_build.CUDA_SOURCES.items() for target in targets]
    with ThreadPoolExecutor(given.processes) as pool:
        found = [k for kernels in pool.map(lambda job: compile_source(compiler, *job), jobs) for k in kernels]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release .*", version)
    text = _report(found, f"nvcc {release[0] if release else '?'}")
    TABLE.write_text(text, encoding="utf-8")
    print(text)
    return 0


def _report(found: Sequence[Kernel], version: str) -> str:
    kernels: dict[tuple[str, str, str], dict[str, Kernel]] = {}
    for kernel in found:
        kernels.setdefault((kernel.name, kernel.dtype, kernel.described), {})[kernel.target] = kernel
    rows = [
        [*key, *(_cell(by_target.get(target)) for target in cuda_build.TARGETS)]
        for key, by_target in sorted(kernels.items())
    ]
    spilling = sum(kernel.spilled > 0 for kernel in found)
    head = (
        "# What the CUDA kernels take of a GPU\n\n"
        f"Made by `python -m benchmarks.cuda_resources` with {version}. **Compiled only: no kernel here has\n"
        "run on a GPU yet.** Registers of a thread, and in brackets bytes of local memory where it spills; clusters\n"
        f"are compiled for sm_90a and newer. {len(found)} kernels, {spilling} of them spill.\n\n"
    )
    made = table(["kernel", "dtype", "compiled for", *cuda_build.TARGETS], rows, 3)
    middle = (
        "\nKiB of shared memory of a block, by hidden size; a block of sm_90 and sm_100 may have "
        f"{LIMIT // 1024}, and what\nis larger is not chosen.\n\n"
    )
    return head + "\n".join([*made, middle + "\n".join(_shared_memory())]) + "\n"


def _shared_memory() -> list[str]:
    """The table of shared memory, as the extension's own layout has it; that of its emulator is the same."""
    path = cuda_build.build_emulator(ROOT / "build" / "emulated")
    spec = importlib.util.spec_from_file_location(cuda_build.EMULATOR, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = []
    for hidden in HIDDEN:
        passes = [{build: sizes for build, *sizes in module.cluster_builds(hidden, way)} for way in (False, True)]
        for build, (blocks, threads, rows_of_batch, forward) in passes[0].items():
            backward = passes[1][build][-1]
            kib = [f"{size / 1024:.0f}" + ("" if size <= LIMIT else " (too large)") for size in (forward, backward)]
            rows.append(
                [str(hidden), f"cluster, {blocks} blocks of {threads} threads, {rows_of_batch} sequences", *kib]
            )
    for hidden in GRID_HIDDEN:
        ways = [module.grid_builds(GRID_BATCH, hidden, way) for way in (False, True)]
        for (groups, blocks, forward), (_, _, backward) in zip(*ways, strict=True):
            kib = [f"{size / 1024:.0f}" + ("" if size <= LIMIT else " (too large)") for size in (forward, backward)]
            rows.append([str(hidden), f"grid, {blocks} blocks of {8 * groups} units, {GRID_BATCH} sequences", *kib])
    return table(["H", "regime", "forward", "backward"], rows, 2)


def _cell(kernel: Kernel | None) -> str:
    if kernel is None:
        return ""
    return f"{kernel.registers}" + (f" ({kernel.spilled})" if kernel.spilled else "")


if __name__ == "__main__":
    sys.exit(main())
