"""Triton kernel of the nearest centre, and its launcher. Shapes as in :mod:`fastseq.ops.nearest_center`.

A running minimum behind the distances of :mod:`fastseq.kernels.clusters`: nothing of size N·K exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.clusters import (
    INFINITY,
    TILE,
    Sizes,
    block,
    check_points,
    outer_grid,
    padded,
    squared_distances,
    tile,
    whole,
)
from fastseq.kernels.launch import Launch, kernel_context


@triton.jit(do_not_specialize=["N"])
def nearest(
    points,
    centers,
    labels,
    distances,
    N,
    K,
    d,
    stride,
    width,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``labels [N]``, of several nearest centres the lowest, and ``distances [N]``. A NaN counts as the smallest."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = n < N
    least = tl.full([BN], INFINITY, dtype=tl.float32)
    label = tl.zeros([BN], dtype=tl.int32)
    for begin in range(0, K, BK):
        j = begin + tl.arange(0, BK)
        value = squared_distances(points, centers, n, j, stride, width, d, BN, BK, BLOCK)
        value = tl.where(value != value, -1.0, value)  # below every distance
        value = tl.where((j < K)[None, :], value, INFINITY)
        smallest = tl.min(value, axis=1)
        first = tl.min(tl.where(value == smallest[:, None], j[None, :], 2147483647), axis=1)
        label = tl.where(smallest < least, first, label)
        least = tl.minimum(least, smallest)
    tl.store(labels + n, label.to(tl.int64), mask=n_ok)
    tl.store(distances + n, tl.where(least < 0, float("nan"), least), mask=n_ok)


def nearest_launch(points: Tensor, centers: Tensor, K: int, labels: Tensor, distances: Tensor) -> Launch:
    """:func:`nearest` of ``points [d, stride]`` and ``centers [d, width]``, into ``labels [N]``, ``distances [N]``."""
    (d, width), N = centers.shape, labels.shape[0]
    return Launch(
        nearest,
        outer_grid((-(-N // TILE),), TILE, tile(K)),
        {
            "points": points,
            "centers": centers,
            "labels": labels,
            "distances": distances,
            "N": N,
            "K": K,
            "d": d,
            "stride": points.shape[1],
            "width": width,
        },
        {"BN": TILE, "BK": tile(K), "BLOCK": block(d)},
    )


def nearest_center_fwd(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """``(labels, squared_distance)``.

    Raises:
        RuntimeError: the dtype is float64.
        ValueError: the centres have another size, dtype or device than the points.
    """
    N, d, K = check_points("nearest_center", z, centers)
    labels, distance = z.new_empty(N, dtype=torch.int64), z.new_empty(N)
    if N:
        with kernel_context(z):
            sizes = Sizes(N, d, 1)  # no K: nothing is kept for each centre
            columns = padded(centers.t(), whole(K))
            for begin, end in sizes.chunks():
                points = padded(z[begin:end].t(), sizes.chunk)
                nearest_launch(points, columns, K, labels[begin:end], distance[begin:end]).run()
    return labels, distance
