"""``python -m benchmarks.gpu`` on the CPU: everything but the device, at tiny sizes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import share_of
from cuda_support import COMPILER

pytest.importorskip("triton", reason="triton is not installed (it is optional)")

from benchmarks import gpu_processes
from benchmarks.gpu_cases import CASES, KINDS, Case, Pair, reference_of

ROOT = Path(__file__).resolve().parents[1]
needs_emulator = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def test_dry_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--no-build", "--out", str(tmp_path), "--limit", "3000"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["problems"] == []
    assert results["tests"] in ("none ran", "passed")
    assert {row["case"].split()[0] for row in results["rows"]} == {"lstm", "rnn"}
    assert {row["mode"] for row in results["rows"]} == {"forward", "training"}
    assert all(row["ratio"]["median"] > 0 and row["plans"]["backward"] for row in results["rows"])
    assert [row["name"] for row in results["floors"]] == [
        "barrier of 1 programs, counter",
        "barrier of 1 programs, flags",
    ]
    assert [row["op"] for row in results["clustering"]] == [
        "loss and gradients, freq",
        "loss and gradients, target",
        "assignment",
        "nearest centre",
    ]
    assert all(row["ms"]["fastseq"]["median"] > 0 for row in results["clustering"])
    assert results["variants"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "floors.png",
        "gpu.json",
        "gpu.md",
        "log.txt",
        "speed.png",
    ]
    assert "dry run" in (tmp_path / "gpu.md").read_text()


HANGS = """
    import pathlib, sys, time
    from benchmarks import gpu
    gpu.GRACE = 0.1
    run = gpu.Run(pathlib.Path(sys.argv[1]), 0.1, True)
    run.results["environment"] = {"device": "none"}
    run.results["tests"] = "passed"
    run.results["floors"].append({"name": "a floor", "value": 1.0, "unit": "µs"})
    run.watch()
    time.sleep(600)
"""


def test_a_run_that_hangs_is_cut_and_its_results_are_kept(tmp_path: Path) -> None:
    child = [sys.executable, "-c", textwrap.dedent(HANGS), str(tmp_path)]
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(child, env={**os.environ, "PYTHONPATH": path}, timeout=300, check=False)
    assert done.returncode == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["state"] == "Cut at the limit; tests: passed"
    assert results["problems"] == ["still running past the limit"]
    assert "a floor" in (tmp_path / "gpu.md").read_text()
    assert {"speed.png", "floors.png", "log.txt"} <= {file.name for file in tmp_path.iterdir()}


def test_children_run_side_by_side_and_end_in_time(tmp_path: Path) -> None:
    """The first waits for what the second leaves; the third would never end."""
    sign = tmp_path / "sign"
    codes = [
        f"import os, time\nwhile not os.path.exists({str(sign)!r}): time.sleep(0.01)\nprint('seen')",
        f"open({str(sign)!r}, 'w')\nraise SystemExit(3)",
    ]
    with (tmp_path / "log").open("w+") as log:
        assert gpu_processes.Children([[sys.executable, "-c", code] for code in codes]).end(300, log) == [0, 3]
        endless = ["sh", "-c", "sleep 1000 & echo $!; wait"]
        assert gpu_processes.Children([endless]).end(2, log) == [None]
        log.seek(0)
        seen, pid = log.read().split()
    assert seen == "seen"
    status, deadline = Path(f"/proc/{pid}/status"), time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError):
        # A process that has ended may still be on the list, and one that has been killed ends when it has a core next.
        while "zombie" not in status.read_text():
            assert time.monotonic() < deadline, "still running"
            time.sleep(0.01)


def test_shares_are_all_of_it() -> None:
    commands = gpu_processes.shares(["module"], most=3)
    assert all(command[:3] == [sys.executable, "-m", "module"] for command in commands)
    found = [share_of([*range(10)], command[-1]) for command in commands]
    assert sorted(itertools.chain(*found)) == [*range(10)]
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert [share_of([*range(5)], f"{number}/2") for number in range(2)] == [[0, 2, 4], [1, 3]]


def test_the_reference_that_is_compiled_is_that_of_the_layer_and_is_open_to_the_compiler() -> None:
    pair = Pair(Case("lstm", 2, 2, 3, 8, layers=2), "float32", torch.device("cpu"), "reference")
    y = reference_of(pair)
    assert torch.equal(y(pair.input), pair.by_fastseq(pair.input))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(y, backend=keep)(pair.input)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("tanh" in target for target in targets)
    assert not any("fastseq" in target for target in targets)


def test_shapes_dtypes_and_variants_are_those_of_the_comparison() -> None:
    """The layers that make gpu compares: sizes as (T, B, I, H, layers), the second packed and with resets too."""
    shapes = [(case.op, case.T, case.B, case.I, case.H, case.layers, case.bidirectional, case.time) for case in CASES]
    second = ("lstm", 512, 64, 512, 512, 1, False)
    assert {*shapes} == {
        ("lstm", 1024, 16, 768, 768, 1, False, ""),
        (*second, ""),
        (*second, "lengths"),
        (*second, "reset"),
        ("lstm", 128, 32, 256, 256, 1, False, ""),
        ("lstm", 100, 256, 128, 128, 1, False, ""),
        ("lstm", 2000, 8, 96, 384, 1, False, ""),
        ("lstm", 1000, 32, 1024, 1024, 1, False, ""),
        ("lstm", 35, 20, 650, 650, 2, False, ""),
        ("lstm", 512, 64, 512, 512, 2, True, ""),
        ("rnn", 1000, 4, 1792, 1792, 1, False, ""),
    }
    assert {*KINDS.values()} == {torch.float16, torch.bfloat16, torch.float32}


def by_emulator(code: str, *arguments: str) -> None:
    """Runs code in a process of its own, CUDA C++ in its emulator and Triton in its interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


MEASURED = """
import sys
from pathlib import Path
import torch
from cuda_support import emulated
from benchmarks import gpu
from benchmarks.gpu_cases import CASES, tiny
run = gpu.Run(Path(sys.argv[1]), 300, dry=True)
run.results["environment"] = {}
with emulated():
    gpu.measure_cuda(run, torch.device("cpu"), [tiny(CASES[0]), CASES[-1]])
run.save()
"""


@needs_emulator
def test_cuda_kernels_are_measured_beside_their_floor(tmp_path: Path) -> None:
    by_emulator(MEASURED, str(tmp_path))
    rows = json.loads((tmp_path / "gpu.json").read_text())["cuda"]
    assert [row["name"] for row in rows[:2]] == [f"barrier of a cluster of {blocks} blocks" for blocks in (8, 16)]
    assert [row["name"].split(", ")[-2:] for row in rows if "CUDA C++" in row["name"]] == [["CUDA C++", "cluster"]] * 4
    assert sum("cuDNN" in row["name"] for row in rows) == sum("Triton" in row["name"] for row in rows) == 4
    assert all(row["value"] > 0 for row in rows)
    assert "## CUDA C++" in (tmp_path / "gpu.md").read_text()


@needs_emulator
@pytest.mark.full
def test_what_the_sanitizer_watches_runs() -> None:
    by_emulator(
        "from cuda_support import emulated\nfrom benchmarks import cuda_sanitized\n"
        "with emulated(): cuda_sanitized.main('cpu')"
    )
