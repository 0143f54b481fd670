"""Launcher of the C++ clustering loss. Shapes as in :mod:`fastseq.ops.clustering_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import STORAGE, address, dense, expect, new_output, storage_of
from fastseq.cpu.student_t import FREQUENCY_LOSS, TARGET_LOSS, check_points
from fastseq.ops.needs import NEEDS_CENTERS, NEEDS_POINTS
from fastseq.ops.tape import accumulate_dtype


def clustering_loss_fwd(
    z: Tensor,
    centers: Tensor,
    target: Tensor | None,
    freq: Tensor | None,
    alpha: float,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, dz, dcenters)``, the gradients empty where not needed."""
    points, features, count = check_points(z, centers)
    wide = accumulate_dtype(z.dtype)
    if (target is None) == (freq is None):
        raise ValueError("the kernel expects either target or freq")
    given = wide if target is None or target.dtype == wide else z.dtype
    expect((("target", target, (points, count), given), ("freq", freq, (count,), wide)))
    dz = new_output(z, z.shape if needs & NEEDS_POINTS else (0,), wide)
    dcenters = new_output(z, centers.shape if needs & NEEDS_CENTERS else (0,), wide)
    mean = reduction == "batchmean"
    if points == 0:
        return z.new_full((), float("nan") if mean else 0.0, dtype=wide), dz.zero_(), dcenters.zero_()
    loss = torch.zeros((), dtype=torch.float64)
    z, centers, target, freq = dense(z), dense(centers), dense(target), dense(freq)  # names: they outlive the call
    _cpu.cluster(
        FREQUENCY_LOSS if target is None else TARGET_LOSS,
        storage_of(z),
        STORAGE[given],
        STORAGE[wide],
        points,
        features,
        count,
        alpha,
        1 / points if mean else 1.0,
        address(z),
        address(centers),
        address(target),
        address(freq),
        0,
        address(loss),
        address(dz),
        address(dcenters),
        torch.get_num_threads(),
    )
    return loss.to(wide), dz, dcenters
