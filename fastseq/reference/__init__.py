"""The specification: every operation in plain PyTorch, readable as its formula, differentiable, on every device and dtype."""

from __future__ import annotations

from fastseq.reference.lstm import lstm
from fastseq.reference.rnn import rnn

__all__ = ["lstm", "rnn"]
