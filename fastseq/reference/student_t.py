"""The soft assignment of deep embedded clustering, as the specification.

    D_ij = ||z_i - mu_j||^2
    u_ij = (1 + D_ij / alpha)^(-(alpha + 1) / 2)
    q_ij = u_ij / sum_j' u_ij'                          (Xie, Girshick & Farhadi 2016, eq. 1; van der Maaten 2009)

in log u, so that it stays finite far from every centre, and from the differences themselves, so that it stays exact far
from the origin. It holds N·K·d numbers: it is there to be read and to be held against, not to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.reference.common import accumulate_dtype, gradients, without_autocast


def squared_distances(z: Tensor, centers: Tensor) -> Tensor:
    """``D [N, K]`` of ``z [N, d]`` and ``centers [K, d]``."""
    return (z[:, None] - centers).square().sum(-1)


def log_assignment(z: Tensor, centers: Tensor, alpha: float) -> Tensor:
    """``log q [N, K]`` of ``z [N, d]`` and ``centers [K, d]``."""
    log_u = -(alpha + 1) / 2 * torch.log1p(squared_distances(z, centers) / alpha)
    return log_u.log_softmax(-1)


def student_t_assignment(z: Tensor, centers: Tensor, alpha: float = 1.0) -> Tensor:
    """``q [N, K]``; arguments and result as :func:`fastseq.functional.student_t_assignment`.

    Any device and floating dtype. Half types are computed in float32, and only q is rounded.
    """
    wide = accumulate_dtype(z.dtype)
    with without_autocast(z):
        return log_assignment(z.to(wide), centers.to(wide), alpha).exp().to(z.dtype)


def student_t_fwd(z: Tensor, centers: Tensor, alpha: float) -> Tensor:
    """The kernel ``fastseq::student_t_fwd``."""
    return student_t_assignment(z, centers, alpha).contiguous()


def student_t_bwd(
    grad_q: Tensor, z: Tensor, centers: Tensor, alpha: float, needs: int, *, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernel ``fastseq::student_t_bwd``: ``dz, dcenters`` by autograd; ``[0]`` where ``needs`` does not ask."""
    dz, dcenters = gradients(
        lambda z, centers: (student_t_assignment(z, centers, alpha),),
        (z, centers),
        (needs & 1, needs & 2),
        (grad_q,),
        differentiable=differentiable,
    )
    return dz, dcenters
