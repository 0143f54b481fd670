"""The soft assignment of deep embedded clustering, as the specification.

    D_ij = ||z_i - mu_j||^2
    u_ij = (1 + D_ij / alpha)^(-(alpha + 1) / 2)
    q_ij = u_ij / sum_j' u_ij'                          (Xie, Girshick & Farhadi 2016, eq. 1; van der Maaten 2009)

in log u, so that it stays finite far from every centre, and from the differences themselves, so that it stays exact far
from the origin. Very near a centre its q is 1 but for what the others leave: there log q is made of that rest, which
would be lost beside 1. It holds N·K·d numbers: it is there to be read and to be held against, not to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.reference.common import accumulate_dtype, gradients, without_autocast


def squared_distances(z: Tensor, centers: Tensor) -> Tensor:
    """``D [N, K]`` of ``z [N, d]`` and ``centers [K, d]``."""
    return (z[:, None] - centers).square().sum(-1)


def log_softmax(x: Tensor) -> Tensor:
    """``x - log sum_j exp(x_j)`` over the last dimension, exact even where the largest result is nearly 0.

    With S the sum of ``exp(x_j - max x)`` over all j but the largest, it is ``(x - max x) - log(1 + S)``: S may be as
    small as it likes, and so may the gradient of the largest, which is made of the others' alone.
    """
    largest = x.argmax(-1, keepdim=True)
    is_largest = torch.zeros_like(x, dtype=torch.bool).scatter(-1, largest, True)
    below = x - x.gather(-1, largest)
    below = torch.where(is_largest, below.detach(), below)  # x - x is constant: 0, or NaN
    others = below.exp().masked_fill(is_largest, 0).sum(-1, keepdim=True)
    return below - others.log1p()


def log_assignment(z: Tensor, centers: Tensor, alpha: float) -> Tensor:
    """``log q [N, K]`` of ``z [N, d]`` and ``centers [K, d]``."""
    log_u = -(alpha + 1) / 2 * torch.log1p(squared_distances(z, centers) / alpha)
    return log_softmax(log_u)


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
