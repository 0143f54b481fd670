"""Launcher of the C++ target distribution. Shapes as in :mod:`fastseq.ops.target_distribution`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import address, dense, expect, storage_of
from fastseq.ops.tape import accumulate_dtype


def target_distribution_fwd(q: Tensor, freq: Tensor | None) -> Tensor:
    """``p [N, K]``."""
    points, count = q.shape
    expect((("q", q, (points, count), q.dtype), ("freq", freq, (count,), accumulate_dtype(q.dtype))))
    p = q.new_empty((points, count))
    if points == 0:
        return p
    q, freq = dense(q), dense(freq)  # names, so that the dense copies outlive the call
    _cpu.target(storage_of(q), points, count, address(q), address(freq), address(p), torch.get_num_threads())
    return p
