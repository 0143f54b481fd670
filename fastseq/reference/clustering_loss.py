"""The loss of deep embedded clustering, as the specification.

    L = KL(P || Q) = sum_ij p_ij log(p_ij / q_ij)                    (Xie, Girshick & Farhadi 2016, eq. 2)

with q as in :mod:`fastseq.reference.student_t` and P held constant: it is given, or made from q and the frequencies of
the whole data set as in :mod:`fastseq.reference.target_distribution`.
"""

from __future__ import annotations

from torch import Tensor

from fastseq.reference.common import accumulate_dtype, gradients, without_autocast
from fastseq.reference.student_t import log_assignment


def clustering_loss(
    z: Tensor,
    centers: Tensor,
    target: Tensor | None = None,
    *,
    freq: Tensor | None = None,
    alpha: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """A scalar; arguments and result as :func:`fastseq.functional.clustering_loss`. Any device and floating dtype."""
    wide = accumulate_dtype(z.dtype)
    with without_autocast(z):
        log_q = log_assignment(z.to(wide), centers.to(wide), alpha)  # [N, K]
        if target is None:
            assert freq is not None
            p = (2 * log_q.detach() - freq.detach().to(wide).log()).softmax(-1)
        else:
            p = target.detach().to(wide)
        # xlogy, since p log p is 0 where p is 0
        loss = (p.xlogy(p) - p * log_q).sum()
        return loss / len(z) if reduction == "batchmean" else loss


def clustering_loss_fwd(
    z: Tensor,
    centers: Tensor,
    target: Tensor | None,
    freq: Tensor | None,
    alpha: float,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel ``fastseq::clustering_loss_fwd``: the loss and its gradients, unrounded: float32 for half types.

    ``needs`` is a mask: 1 asks for ``dz``, 2 for ``dcenters``; what is not asked for has shape ``[0]``.
    """
    wide = accumulate_dtype(z.dtype)
    given = z.to(wide), centers.to(wide)

    def loss(z: Tensor, centers: Tensor) -> tuple[Tensor]:
        return (clustering_loss(z, centers, target, freq=freq, alpha=alpha, reduction=reduction),)

    (value,) = loss(*given)
    dz, dcenters = gradients(loss, given, (needs & 1, needs & 2), (value.new_ones(()),))
    return value.clone(), dz, dcenters


def clustering_loss_bwd(
    grad: Tensor,
    z: Tensor,
    centers: Tensor,
    target: Tensor | None,
    freq: Tensor | None,
    dz: Tensor,
    dcenters: Tensor,
    alpha: float,
    reduction: str,
    needs: int,
    *,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    """The kernel ``fastseq::clustering_loss_bwd``: gradients for a loss at which ``grad []`` arrives.

    Differentiable, it takes them by autograd and does without ``dz`` and ``dcenters``; else it scales those.
    """
    if differentiable:
        gz, gcenters = gradients(
            lambda z, c: (clustering_loss(z, c, target, freq=freq, alpha=alpha, reduction=reduction),),
            (z, centers),
            (needs & 1, needs & 2),
            (grad,),
            differentiable=True,
        )
        return gz, gcenters
    asked = (needs & 1, dz, z), (needs & 2, dcenters, centers)
    gz, gcenters = ((grad * made).to(like.dtype) if need else like.new_empty(0) for need, made, like in asked)
    return gz, gcenters
