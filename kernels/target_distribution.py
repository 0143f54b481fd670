"""Triton kernel of the target distribution, and its launcher. Shapes as in :mod:`fastseq.ops.target_distribution`.

The sums over the points, where no frequencies are given, are torch's, which adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.clusters import careful_add, tile
from fastseq.kernels.launch import Grid, Launch, expect, kernel_context

ROWS = 32  # points of a program


@triton.jit
def sharpened(q, freq, n, n_ok, j, K):
    """[BN, BK] of q^2 / f, zero beyond the last centre, and where to find it."""
    ok = n_ok[:, None] & (j < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + j[None, :]
    value = tl.load(q + at, mask=ok, other=0.0).to(tl.float32)
    frequency = tl.broadcast_to(tl.load(freq + j, mask=j < K, other=1.0)[None, :], value.shape)
    return tl.div_rn(value * value, frequency), at, ok


@triton.jit(do_not_specialize=["N"])
def sharpen(q, freq, p, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """``p [N, K]``, q^2 / f over its sum along each row."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = n < N
    total = tl.zeros([BN], dtype=tl.float32)
    lost = tl.zeros([BN], dtype=tl.float32)
    for begin in range(0, K, BK):
        weight, _, _ = sharpened(q, freq, n, n_ok, begin + tl.arange(0, BK), K)
        total, lost = careful_add(total, lost, tl.sum(weight, axis=1))
    for begin in range(0, K, BK):
        weight, at, ok = sharpened(q, freq, n, n_ok, begin + tl.arange(0, BK), K)
        tl.store(p + at, tl.div_rn(weight, tl.broadcast_to(total[:, None], (BN, BK))), mask=ok)


def sharpen_launch(q: Tensor, freq: Tensor, p: Tensor) -> Launch:
    """:func:`sharpen` of ``q [N, K]`` with ``freq [K]`` into ``p [N, K]``."""
    N, K = q.shape
    return Launch(
        sharpen,
        Grid((-(-N // ROWS),)),
        {"q": q, "freq": freq, "p": p, "N": N, "K": K},
        {"BN": ROWS, "BK": tile(K)},
    )


def target_distribution_fwd(q: Tensor, freq: Tensor | None) -> Tensor:
    """``p [N, K]``.

    Raises:
        RuntimeError: the dtype is float64.
        ValueError: a tensor has the wrong size, dtype or device.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(
            f"the Triton target_distribution serves float32, float16 and bfloat16, not {q.dtype}; use the reference"
        )
    N, K = q.shape
    expect((("freq", freq, (K,), torch.float32),), q.device)
    p = q.new_empty((N, K))
    if N:
        with kernel_context(q):
            q = q.contiguous()
            frequencies = q.sum(0, dtype=torch.float32) if freq is None else freq.contiguous()
            sharpen_launch(q, frequencies, p).run()
    return p
