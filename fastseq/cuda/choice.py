"""Triton or CUDA C++: what walks an LSTM through time where ``FASTSEQ_IMPL=gpu`` leaves the choice to fastseq.

A cluster keeps on chip what Triton's persistent regime exchanges through global memory, so it is taken wherever one
serves the call: half types, T > 1, no options but step flags, and a build that fits this device. The grid, which has
its weights in registers too, is where Triton's programs would read theirs, or a part, at every step. All else is
Triton's. **No GPU has measured that rule yet.**
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import cuda
from fastseq.cuda import lstm, plan
from fastseq.kernels import lstm as triton_lstm
from fastseq.kernels import plan as triton_plan
from fastseq.kernels.launch import chip_of


def cuda_serves(
    steps: int,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    flags: Tensor | None,
    options: Sequence[Tensor | None],
) -> bool:
    """Whether a pass of an LSTM goes to the CUDA kernels."""
    if cuda.why_unavailable(device.type) is not None or any(option is not None for option in options):
        return False
    regime = plan.choose(steps, batch, hidden, dtype, device, backward, flags is not None).regime
    if regime != "grid":
        return regime == "cluster"
    shape = triton_plan.Shape(4, backward, steps, batch, hidden, dtype.itemsize)
    return triton_plan.choose(shape, chip_of(device)).cut.kept != "held"


def run_forward(*arguments: Any) -> None:
    """The recurrence of a forward. Arguments as of :func:`fastseq.kernels.lstm.run_forward`."""
    y, flags, options = arguments[6], arguments[8], arguments[10:]
    steps, batch, hidden = y.shape
    by_cuda = cuda_serves(steps, batch, hidden, y.dtype, y.device, False, flags, options)
    (lstm if by_cuda else triton_lstm).run_forward(*arguments)


def run_backward(*arguments: Any) -> None:
    """The recurrence of a backward. Arguments as of :func:`fastseq.kernels.lstm.run_backward`."""
    c, c0, flags, options = arguments[3], arguments[4], arguments[8], arguments[10:]
    batch, hidden = c0.shape
    by_cuda = cuda_serves(len(c), batch, hidden, c0.dtype, c0.device, True, flags, options)
    (lstm if by_cuda else triton_lstm).run_backward(*arguments)
