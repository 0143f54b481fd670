"""The frequencies of the clusters over a whole data set, streamed: what minibatches need of one another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastseq.ops.student_t import student_t_assignment

# How many numbers of q are held at a time.
_HELD = 1 << 20


def accumulate_frequencies(
    z_batches: Iterable[Tensor], centers: Tensor, *, alpha: float = 1.0, group: ProcessGroup | None = None
) -> Tensor:
    """``f_j = sum_i q_ij`` over all batches, for :func:`target_distribution` and :func:`clustering_loss`.

    Args:
        z_batches: points in batches ``[N, d]`` of any sizes; a data set that is not in memory may be streamed.
        centers: ``[K, d]``.
        alpha: as in :func:`student_t_assignment`.
        group: a ``torch.distributed`` process group, each rank of which gives its own batches; the result is the sum
            over all ranks, on each of them. None: this process alone.

    Returns:
        ``f [K]`` in float64, without gradient, where ``centers`` is.

    Raises:
        TypeError, ValueError, fastseq.ShapeError: as :func:`student_t_assignment`.
    """
    total = torch.zeros(centers.shape[0], dtype=torch.float64, device=centers.device)
    rows = max(1, _HELD // max(1, centers.shape[0]))
    with torch.no_grad():
        for z in z_batches:
            for part in z.split(rows):
                total += student_t_assignment(part, centers, alpha).sum(0, dtype=torch.float64)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total
