"""The public functions: recurrences, one call per layer and direction over the whole sequence, and clustering.

See :mod:`fastseq.ops`.
"""

from __future__ import annotations

from fastseq.ops.clustering_loss import clustering_loss
from fastseq.ops.frequencies import accumulate_frequencies
from fastseq.ops.lstm import lstm
from fastseq.ops.nearest_center import nearest_center
from fastseq.ops.rnn import rnn
from fastseq.ops.state import detach_state
from fastseq.ops.student_t import student_t_assignment
from fastseq.ops.target_distribution import target_distribution

__all__ = [
    "accumulate_frequencies",
    "clustering_loss",
    "detach_state",
    "lstm",
    "nearest_center",
    "rnn",
    "student_t_assignment",
    "target_distribution",
]
