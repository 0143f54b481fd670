"""Triton kernels of the clustering loss, and their launchers. Shapes as in :mod:`fastseq.ops.clustering_loss`.

The loss and the weights of both gradients come from one walk along the centres of each point, so with frequencies
nothing of size N·K exists, and with a target only the target. The rest is in :mod:`fastseq.kernels.clusters`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.clusters import (
    Chunk,
    check_points,
    excess_of,
    load_ratios,
    log,
    log1p,
    log_or_zero,
    numerator,
    row_sums,
    store_weights,
    walk,
)
from fastseq.kernels.launch import Launch, expect, kernel_context
from fastseq.kernels.student_t import ROWS, row_launch
from fastseq.ops.needs import NEEDS_CENTERS, NEEDS_POINTS


@triton.jit(do_not_specialize=["N"])
def weigh_target(
    ratios,
    target,
    rows,
    losses,
    N,
    K,
    stride,
    width,
    half_power,
    scale,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The weights ``scale v_j (p_j - q_j sum p)`` of z - mu_j, v_j = 1 / (1 + ratio_j), and a program's part of the
    sum of p log(p / q)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = n < N
    least, total, mass = row_sums(ratios, target, n, n_ok, K, stride, half_power, UNIT, "given", BN, BK)
    log_total = log(total)
    loss = tl.zeros([BN], dtype=tl.float32)
    for begin in range(0, K, BK):
        j = begin + tl.arange(0, BK)
        ratio = load_ratios(ratios, n, n_ok, j, K, stride)
        ok = n_ok[:, None] & (j < K)[None, :]
        p = tl.load(target + n.to(tl.int64)[:, None] * K + j[None, :], mask=ok, other=0.0).to(tl.float32)
        excess = excess_of(ratio, least[:, None])
        # q itself may have underflowed.
        log_ratio = log_or_zero(p) + half_power * log1p(excess) + log_total[:, None]
        loss += tl.sum(tl.where(p == 0, 0.0, p * log_ratio), axis=1)
        if COLUMNS or rows is not None:
            q = tl.div_rn(numerator(excess, half_power, UNIT), tl.broadcast_to(total[:, None], (BN, BK)))
            w = scale * (p - q * mass[:, None]) / (1.0 + ratio)
            store_weights(ratios if COLUMNS else None, rows, w, n, n_ok, j, K, stride, width)
    # A row whose p is zero has no part in the loss, but one that is not finite makes it NaN.
    loss += 0.0 * total
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(n_ok, loss, 0.0), axis=0))


@triton.jit(do_not_specialize=["N"])
def weigh_frequencies(
    ratios,
    inverse,
    rows,
    losses,
    N,
    K,
    stride,
    width,
    half_power,
    scale,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The same with the target made of q and ``inverse [K]`` frequencies: p_j = u_j^2 inverse_j / sum_k of these."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = n < N
    least, total, sharp = row_sums(ratios, inverse, n, n_ok, K, stride, half_power, UNIT, "sharp", BN, BK)
    loss = tl.zeros([BN], dtype=tl.float32)
    for begin in range(0, K, BK):
        j = begin + tl.arange(0, BK)
        ratio = load_ratios(ratios, n, n_ok, j, K, stride)
        u = numerator(excess_of(ratio, least[:, None]), half_power, UNIT)
        q = tl.div_rn(u, tl.broadcast_to(total[:, None], (BN, BK)))
        each = tl.load(inverse + j, mask=j < K, other=0.0)[None, :]
        relation = tl.div_rn(u * each * total[:, None], tl.broadcast_to(sharp[:, None], (BN, BK)))  # p / q
        loss += tl.sum(q * relation * log_or_zero(relation), axis=1)
        if COLUMNS or rows is not None:
            w = scale * q * (relation - 1.0) / (1.0 + ratio)
            store_weights(ratios if COLUMNS else None, rows, w, n, n_ok, j, K, stride, width)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(n_ok, loss, 0.0), axis=0))


# Launchers.


def loss_launch(
    chunk: Chunk, target: Tensor | None, inverse: Tensor | None, losses: Tensor, alpha: float, scale: float
) -> Launch:
    """The kernel for ``target [N, K]`` or for inverse frequencies; ``losses`` has a number for each program of all
    chunks. ``scale`` is that of the loss."""
    tensors: dict[str, Tensor | None] = {"rows": chunk.rows, "losses": losses[chunk.begin // ROWS :]}
    numbers, constants = {"scale": scale * (alpha + 1) / alpha}, {"COLUMNS": chunk.columns}
    if target is None:
        return row_launch(weigh_frequencies, chunk, alpha, tensors | {"inverse": inverse}, numbers, constants)
    tensors |= {"target": target[chunk.begin : chunk.end]}
    return row_launch(weigh_target, chunk, alpha, tensors, numbers, constants)


def clustering_loss_fwd(
    z: Tensor,
    centers: Tensor,
    target: Tensor | None,
    freq: Tensor | None,
    alpha: float,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, dz, dcenters)`` in float32, the gradients empty where not needed.

    Raises:
        RuntimeError: the dtype is float64.
        ValueError: a tensor has the wrong size, dtype or device, or not exactly one of target and freq is given.
    """
    N, _, K = check_points("clustering_loss", z, centers)
    if (target is None) == (freq is None):
        raise ValueError("the kernel expects either target or freq")
    wide = torch.float32
    given = wide if target is None or target.dtype == wide else z.dtype
    expect((("target", target, (N, K), given), ("freq", freq, (K,), wide)), z.device)
    dz = z.new_empty(z.shape, dtype=wide) if needs & NEEDS_POINTS else None
    dcenters = centers.new_zeros(centers.shape, dtype=wide) if needs & NEEDS_CENTERS else None
    mean = reduction == "batchmean"
    losses = z.new_zeros(-(-N // ROWS), dtype=wide)
    with kernel_context(z):
        dense = None if target is None else target.contiguous()
        inverse = None if freq is None else freq.reciprocal()
        scale = 1 / N if mean and N else 1.0
        if N:
            walk(
                z,
                centers,
                alpha,
                lambda chunk: loss_launch(chunk, dense, inverse, losses, alpha, scale),
                dz,
                dcenters,
            )
        loss = losses.sum(dtype=torch.float64)
        loss = (loss / N if mean else loss).to(wide)  # 0 / 0 of no points is NaN, as torch has it
    none = z.new_empty(0, dtype=wide)
    return loss, none if dz is None else dz, none if dcenters is None else dcenters
