"""Launchers of the C++ kernels for points and centres: soft assignment. Shapes as in :mod:`fastseq.ops.student_t`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import address, dense, expect, new_gradients, storage_of
from fastseq.ops.needs import NEEDS_CENTERS, NEEDS_POINTS

ASSIGN, ASSIGN_BACKWARD, TARGET_LOSS, FREQUENCY_LOSS = range(4)  # the tasks of the kernel


def check_points(z: Tensor, centers: Tensor) -> tuple[int, int, int]:
    """The sizes (N, d, K), with both inputs found to have the size they say."""
    points, features = z.shape
    count = centers.shape[0]
    expect((("z", z, (points, features), z.dtype), ("centers", centers, (count, features), z.dtype)))
    return points, features, count


def student_t_fwd(z: Tensor, centers: Tensor, alpha: float) -> Tensor:
    """``q [N, K]``."""
    sizes = check_points(z, centers)
    q = z.new_empty((sizes[0], sizes[2]))
    if sizes[0] == 0:
        return q
    z, centers = dense(z), dense(centers)  # names, so that the dense copies outlive the call
    code = storage_of(z)
    _cpu.cluster(
        ASSIGN,
        code,
        code,
        code,
        *sizes,
        alpha,
        1.0,
        address(z),
        address(centers),
        0,
        0,
        address(q),
        0,
        0,
        0,
        torch.get_num_threads(),
    )
    return q


def student_t_bwd(grad_q: Tensor, z: Tensor, centers: Tensor, alpha: float, needs: int) -> tuple[Tensor, ...]:
    """``(dz, dcenters)``, empty where not needed."""
    sizes = check_points(z, centers)
    expect((("grad_q", grad_q, (sizes[0], sizes[2]), z.dtype),))
    results = new_gradients(((needs & NEEDS_POINTS, z), (needs & NEEDS_CENTERS, centers)))
    if sizes[0] == 0:
        return tuple(result.zero_() for result in results)
    dz, dcenters = results
    grad_q, z, centers = dense(grad_q), dense(z), dense(centers)
    code = storage_of(z)
    _cpu.cluster(
        ASSIGN_BACKWARD,
        code,
        code,
        code,
        *sizes,
        alpha,
        1.0,
        address(z),
        address(centers),
        address(grad_q),
        0,
        0,
        0,
        address(dz),
        address(dcenters),
        torch.get_num_threads(),
    )
    return results
