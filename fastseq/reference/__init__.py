"""The specification: every operation in plain PyTorch, differentiable, readable as its formula, on every device."""

from __future__ import annotations

from fastseq.reference.clustering_loss import clustering_loss
from fastseq.reference.lstm import lstm
from fastseq.reference.nearest_center import nearest_center
from fastseq.reference.rnn import rnn
from fastseq.reference.student_t import student_t_assignment
from fastseq.reference.target_distribution import target_distribution

__all__ = ["clustering_loss", "lstm", "nearest_center", "rnn", "student_t_assignment", "target_distribution"]
