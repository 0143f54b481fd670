"""``FASTSEQ_IMPL=gpu``: CUDA C++ for the LSTMs that a cluster serves or whose weights only it keeps on chip, Triton for
the rest; and when ``fastseq._cuda`` is built."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import cuda_build
import pytest
import torch
from cuda_support import COMPILER, emulated, needs_launchers

from fastseq.ops import dispatch

needs_emulator = pytest.mark.skipif(COMPILER is None, reason="needs g++")

# Triton interprets only where the variable was set before it was imported, so in a process of its own.
BOTH = """
import torch
from cuda_support import emulated
from fastseq.cuda import choice
from fastseq.testing import assert_matches_reference
from recurrence_cases import Case, inputs_of

walked = []
for name, of in (("cluster", choice.lstm), ("triton", choice.triton_lstm)):
    for walk in ("run_forward", "run_backward"):
        def told(*arguments, name=name, run=getattr(of, walk)):
            walked.append(name)
            run(*arguments)
        setattr(of, walk, told)
for dtype, case, expected in (
    (torch.float16, Case(3, 2, 3, 20, time="lengths+reset"), "cluster"),
    (torch.float16, Case(1, 2, 3, 20), "triton"),
    (torch.float32, Case(2, 2, 3, 20), "triton"),
):
    with emulated():
        assert_matches_reference("lstm", inputs_of(case, 4, dtype), implementation="gpu", seed=1)
    assert walked == [expected, expected], (case, walked)
    walked.clear()
with emulated():
    assert_matches_reference("rnn", inputs_of(Case(2, 2, 3, 20), 1, torch.float32), implementation="gpu", seed=1)
assert not walked
"""


@needs_launchers
@needs_emulator
def test_clusters_where_they_serve_and_triton_for_the_rest() -> None:
    """On a CPU, by the emulator and Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", BOTH], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_launchers
@needs_emulator
def test_which_calls_go_to_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.cuda import choice

    chips = {"H100": choice.triton_plan.H100, "A100": choice.triton_plan.Chip(108, 163 * 1024, 8)}
    chip = "H100"
    monkeypatch.setattr(choice, "chip_of", lambda device: chips[chip])

    def serves(steps: int, hidden: int, dtype: torch.dtype, *options: Any, device: str = "cpu") -> bool:
        where = torch.device(device)
        return choice.cuda_serves(steps, 16, hidden, dtype, where, False, None, options)

    assert not serves(100, 512, torch.float16)  # there is no extension for CPU tensors
    with emulated():
        assert serves(100, 512, torch.float16, None, None)
        assert not serves(100, 512, torch.float16, None, torch.ones(1))
        assert not serves(1, 512, torch.float16)
        assert not serves(100, 769, torch.float16)  # the grid could, but Triton has room for the weights too
        assert not serves(100, 2048, torch.float16)
        assert serves(100, 2049, torch.float16)  # there the grid alone
        assert serves(100, 2112, torch.float16)
        assert not serves(100, 2113, torch.float16)  # nor has the grid
        chip = "A100"
        assert not serves(100, 1536, torch.float16)
        assert serves(100, 1537, torch.float16)
        chip = "H100"
        assert not serves(100, 1900, torch.float32)
        assert not serves(100, 512, torch.float32)
        assert not serves(100, 512, torch.float16, device="meta")


def test_gpu_is_refused_where_triton_cannot_serve() -> None:
    for device, options, reason in (("cpu", [], "CUDA tensors only"), ("cuda", ["layer_norm"], "not serve layer_norm")):
        why = dispatch.why_not(dispatch.GPU, device, "lstm", options) or ""
        assert reason in why or "triton is not installed" in why


def test_when_the_extension_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` asks for nvcc and a GPU, ``1`` for nvcc, ``0`` for nothing."""
    for there in (True, False):
        monkeypatch.setattr(cuda_build, "gpu_present", lambda there=there: there)
        monkeypatch.setenv("NVCC", "/opt/nvcc")
        assert cuda_build.wanted_nvcc("0") is None
        assert cuda_build.wanted_nvcc("1") == "/opt/nvcc"
        assert cuda_build.wanted_nvcc("auto") == ("/opt/nvcc" if there else None)
        monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
        assert cuda_build.wanted_nvcc("auto") is None
        with pytest.raises(SystemExit, match="needs nvcc"):
            cuda_build.wanted_nvcc("1")
        monkeypatch.undo()
    with pytest.raises(SystemExit, match="expected 0, 1 or auto, got 'yes'"):
        cuda_build.wanted_nvcc("yes")
