"""The order of the sequences in a batch: that of the caller, and that in which the layers compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastseq.ops.checks import readable

# The CPU kernels take about this many sequences together, and leave out a step where all of these have ended.
TOGETHER = 6


@dataclass(frozen=True)
class BatchOrder:
    """A permutation of the batch, as index tensors [B].

    Attributes:
        there: the caller's positions in the order of the layers.
        back: the layers' positions in the order of the caller.
    """

    there: Tensor
    back: Tensor

    @classmethod
    def by_length(cls, x: Tensor, lengths: Tensor | None) -> BatchOrder | None:
        """Longest first, so that sequences that are computed together end together; None where that saves nothing.

        Args:
            x: the input [T, B, I].
            lengths: integers [B], or None.
        """
        if lengths is None or x.device.type != "cpu" or x.size(1) <= TOGETHER or not readable(lengths):
            return None
        lengths = lengths.cpu()
        if bool((lengths[1:] <= lengths[:-1]).all()):
            return None
        there = torch.argsort(lengths, descending=True, stable=True)
        return cls(there, torch.argsort(there))
