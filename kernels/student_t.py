"""Triton kernels of the soft assignment, and their launchers. Shapes as in :mod:`fastseq.ops.student_t`.

How points and centres are cut into chunks and tiles, and the gradients: :mod:`fastseq.kernels.clusters`.
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
    numerator,
    row_sums,
    store_weights,
    tile,
    walk,
    whole,
)
from fastseq.kernels.launch import Grid, Launch, expect, kernel_context
from fastseq.ops.needs import NEEDS_CENTERS, NEEDS_POINTS

ROWS = 32  # points of a program that walks along the centres


@triton.jit(do_not_specialize=["N"])
def assign(ratios, q, N, K, stride, half_power, UNIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``q [N, K]``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = n < N
    least, total, _ = row_sums(ratios, None, n, n_ok, K, stride, half_power, UNIT, "", BN, BK)
    for begin in range(0, K, BK):
        j = begin + tl.arange(0, BK)
        excess = excess_of(load_ratios(ratios, n, n_ok, j, K, stride), least[:, None])
        value = tl.div_rn(numerator(excess, half_power, UNIT), tl.broadcast_to(total[:, None], (BN, BK)))
        at = q + n.to(tl.int64)[:, None] * K + j[None, :]
        tl.store(at, value, mask=n_ok[:, None] & (j < K)[None, :])


@triton.jit(do_not_specialize=["N"])
def weigh_arriving(
    ratios,
    grad_q,
    rows,
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
    """The weights ``-scale v_j q_j (g_j - sum_k g_k q_k)`` of z - mu_j for the gradient g that arrives at q, with
    v_j = 1 / (1 + ratio_j)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = n < N
    least, total, mean = row_sums(ratios, grad_q, n, n_ok, K, stride, half_power, UNIT, "product", BN, BK)
    mean = tl.div_rn(mean, total)
    for begin in range(0, K, BK):
        j = begin + tl.arange(0, BK)
        ratio = load_ratios(ratios, n, n_ok, j, K, stride)
        ok = n_ok[:, None] & (j < K)[None, :]
        g = tl.load(grad_q + n.to(tl.int64)[:, None] * K + j[None, :], mask=ok, other=0.0).to(tl.float32)
        u = numerator(excess_of(ratio, least[:, None]), half_power, UNIT)
        q = tl.div_rn(u, tl.broadcast_to(total[:, None], (BN, BK)))
        w = scale * q * (mean[:, None] - g) / (1.0 + ratio)
        store_weights(ratios if COLUMNS else None, rows, w, n, n_ok, j, K, stride, width)


# Launchers.


def row_launch(
    kernel: triton.runtime.JITFunction,
    chunk: Chunk,
    alpha: float,
    tensors: dict[str, Tensor | None],
    numbers: dict[str, float],
    constants: dict[str, bool],
) -> Launch:
    """A kernel that walks along the centres of a chunk's points, with what all of these take."""
    N, (K, stride) = chunk.end - chunk.begin, chunk.ratios.shape
    arguments: dict[str, Tensor | float | None] = {
        "ratios": chunk.ratios,
        "N": N,
        "K": K,
        "stride": stride,
        "half_power": (alpha + 1) / 2,
    }
    if "COLUMNS" in constants:
        arguments["width"] = whole(K)
    sizes = {"UNIT": alpha == 1, "BN": ROWS, "BK": tile(K)}
    return Launch(kernel, Grid((-(-N // ROWS),)), arguments | tensors | numbers, constants | sizes)


def assign_launch(chunk: Chunk, q: Tensor, alpha: float) -> Launch:
    """:func:`assign` of a chunk, into ``q [N, K]`` of all points."""
    return row_launch(assign, chunk, alpha, {"q": q[chunk.begin : chunk.end]}, {}, {})


def arriving_launch(chunk: Chunk, grad_q: Tensor, alpha: float) -> Launch:
    """:func:`weigh_arriving` of a chunk, with the gradient at all of q."""
    tensors = {"grad_q": grad_q[chunk.begin : chunk.end], "rows": chunk.rows}
    numbers = {"scale": (alpha + 1) / alpha}
    return row_launch(weigh_arriving, chunk, alpha, tensors, numbers, {"COLUMNS": chunk.columns})


def student_t_fwd(z: Tensor, centers: Tensor, alpha: float) -> Tensor:
    """``q [N, K]``.

    Raises:
        RuntimeError: the dtype is float64.
        ValueError: a tensor has the wrong size, dtype or device.
    """
    N, _, K = check_points("student_t_assignment", z, centers)
    q = z.new_empty((N, K))
    if N:
        with kernel_context(z):
            walk(z, centers, alpha, lambda chunk: assign_launch(chunk, q, alpha), None, None)
    return q


def student_t_bwd(grad_q: Tensor, z: Tensor, centers: Tensor, alpha: float, needs: int) -> tuple[Tensor, Tensor]:
    """``(dz, dcenters)``, empty where not needed. Raises as :func:`student_t_fwd`."""
    N, _, K = check_points("student_t_assignment", z, centers)
    expect((("grad_q", grad_q, (N, K), z.dtype),), z.device)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format) if needs & NEEDS_POINTS else None
    dcenters = centers.new_zeros(centers.shape) if needs & NEEDS_CENTERS else None
    if N and needs:
        with kernel_context(z):
            dense = grad_q.contiguous()
            walk(z, centers, alpha, lambda chunk: arriving_launch(chunk, dense, alpha), dz, dcenters)
    none = z.new_empty(0)
    return none if dz is None else dz, none if dcenters is None else dcenters
