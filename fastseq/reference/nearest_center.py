"""The nearest of some centres, as the specification: the smallest j that minimises D_ij = ||z_i - mu_j||^2."""

from __future__ import annotations

from torch import Tensor

from fastseq.reference.common import accumulate_dtype, without_autocast
from fastseq.reference.student_t import squared_distances


def nearest_center(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """``labels [N]``, ``squared_distance [N]``; as :func:`fastseq.functional.nearest_center`.

    Any device and floating dtype. Half types are computed in float32, and only the distance is rounded.
    """
    wide = accumulate_dtype(z.dtype)
    with without_autocast(z):
        distances = squared_distances(z.to(wide), centers.to(wide))  # [N, K]
        labels = distances.argmin(-1)
        return labels, distances.gather(-1, labels[:, None])[:, 0].to(z.dtype)


def nearest_center_fwd(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel ``fastseq::nearest_center_fwd``."""
    labels, distance = nearest_center(z, centers)
    return labels, distance.contiguous()
