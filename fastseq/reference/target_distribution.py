"""The target of deep embedded clustering, as the specification.

f_j = sum_i q_ij        p_ij = (q_ij^2 / f_j) / sum_j' (q_ij'^2 / f_j')        (Xie, Girshick & Farhadi 2016, eq. 3)
"""

from __future__ import annotations

from torch import Tensor

from fastseq.reference.common import accumulate_dtype, without_autocast


def target_distribution(q: Tensor, freq: Tensor | None = None) -> Tensor:
    """``p [N, K]``; arguments and result as :func:`fastseq.functional.target_distribution`.

    Any device and floating dtype. Half types are computed in float32, and only p is rounded.
    """
    wide = accumulate_dtype(q.dtype)
    with without_autocast(q):
        values = q.to(wide)
        weights = values.square() / (values.sum(0) if freq is None else freq.to(wide))
        return (weights / weights.sum(-1, keepdim=True)).to(q.dtype)


def target_distribution_fwd(q: Tensor, freq: Tensor | None) -> Tensor:
    """The kernel ``fastseq::target_distribution_fwd``."""
    return target_distribution(q, freq).contiguous()
