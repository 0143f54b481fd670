"""Runs ``triton_interpreted*.py`` in processes of their own: that triton interprets is settled by its import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq.ops import dispatch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it is optional)"
)
HERE = Path(__file__).parent


@pytest.mark.long
@pytest.mark.parametrize("module", sorted(file.name for file in HERE.glob("triton_interpreted*.py")))
def test_kernels_in_the_interpreter(module: str, request: pytest.FixtureRequest) -> None:
    options = ["--full"] if request.config.getoption("--full") else []
    seed = request.config.getoption("--seed")
    options += [] if seed is None else [f"--seed={seed}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", module, *options],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_triton_serves_cpu_tensors_only_in_the_interpreter() -> None:
    """This process compiles."""
    assert "CUDA tensors only" in (dispatch.why_not("triton", "cpu") or "")
    assert dispatch.why_not("triton", "cuda") is None


def test_triton_is_not_chosen_by_itself() -> None:
    for op in dispatch.OPS:
        backend, reason = dispatch.serving(op, "cuda")
        assert backend == "reference"
        assert "not been verified on a GPU" in reason


def test_forced_triton_is_told_as_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_forced", "triton")
    backend, reason = dispatch.serving("lstm", "cuda")
    assert backend == "triton"
    assert "not verified on a GPU" in reason


def test_importing_fastseq_imports_no_triton() -> None:
    code = "import sys, fastseq; fastseq.info(); raise SystemExit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
