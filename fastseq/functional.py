"""The public functions: one call per layer and direction over the whole sequence. See :mod:`fastseq.ops`."""

from __future__ import annotations

from fastseq.ops.lstm import lstm
from fastseq.ops.rnn import rnn
from fastseq.ops.state import detach_state

__all__ = ["detach_state", "lstm", "rnn"]
