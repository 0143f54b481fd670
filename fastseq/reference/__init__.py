"""The specification: every operation in plain PyTorch, differentiable, readable as its formula, on every device."""

from __future__ import annotations

from fastseq.reference.lstm import lstm
from fastseq.reference.rnn import rnn

__all__ = ["lstm", "rnn"]
