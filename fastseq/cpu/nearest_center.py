"""Launcher of the C++ search for the nearest centre. Shapes as in :mod:`fastseq.ops.nearest_center`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import address, dense, storage_of
from fastseq.cpu.student_t import check_points


def nearest_center_fwd(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """``(labels, squared_distance)``."""
    sizes = check_points(z, centers)
    labels, distance = z.new_empty(sizes[0], dtype=torch.int64), z.new_empty(sizes[0])
    if sizes[0] == 0:
        return labels, distance
    z, centers = dense(z), dense(centers)  # names, so that the dense copies outlive the call
    _cpu.nearest(
        storage_of(z),
        *sizes,
        address(z),
        address(centers),
        address(labels),
        address(distance),
        torch.get_num_threads(),
    )
    return labels, distance
