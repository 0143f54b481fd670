"""What the tests marked ``gpu`` share: inputs on the device, the watch for deadlocks, streams."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import functional as F
from fastseq.testing import use_implementation


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def assert_comes_back(code: str, seconds: float) -> None:
    """Runs Python code in a child; if it does not end in time it is killed, and the whole run given up."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], timeout=seconds, check=False, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        pytest.exit(f"a kernel did not come back within {seconds} s: a deadlock", returncode=3)
    assert done.returncode == 0, done.stderr[-4000:]


def y_and_gradients(op: str, inputs: dict[str, Any], implementation: str) -> list[Tensor]:
    """y, and the gradient of its sum for every floating input."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    with use_implementation(implementation):
        y = getattr(F, op)(**leaves)[0]
        wanted = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]


def assert_same_bits_on_a_second_stream(call: Callable[[], list[Tensor]], times: int) -> None:
    """A call runs on the current stream and leaves the other alone: two at once give what one gives."""
    expected = call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(times):
        with torch.cuda.stream(stream):
            other = call()
        here = call()
        torch.cuda.synchronize()
        for found in (other, here):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
