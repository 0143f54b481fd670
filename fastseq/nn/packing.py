"""Between a PackedSequence and a padded, time-major batch with lengths.

Both directions are one indexed copy (no sort and no loop over time), made of differentiable PyTorch operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Packing:
    """Where the rows of ``PackedSequence.data`` lie in a padded [T, B, ·] batch.

    Attributes:
        lengths: [B], int64 on the CPU, in the order of the packed batch (longest first).
        rows: [N], int64 on the data's device: ``data[n]`` is row ``rows[n]`` of the batch flattened to [T·B, ·].
        steps: T, the longest length.
        batch: B, the number of sequences.
    """

    lengths: Tensor
    rows: Tensor
    steps: int
    batch: int

    @classmethod
    def of(cls, packed: PackedSequence) -> Packing:
        batch_sizes = packed.batch_sizes  # [T], on the CPU, never rising
        steps = batch_sizes.numel()
        batch = int(batch_sizes[0])
        valid = batch_sizes[:, None] > torch.arange(batch)  # [T, B]
        rows = valid.reshape(-1).nonzero().squeeze(1)  # time-major, so in the order of the data
        return cls(valid.sum(0), rows.to(packed.data.device), steps, batch)

    def pad(self, data: Tensor) -> Tensor:
        """[N, F] -> [T, B, F], zeros past each sequence's end."""
        flat = data.new_zeros(self.steps * self.batch, data.size(1)).index_copy(0, self.rows, data)
        return flat.view(self.steps, self.batch, data.size(1))

    def pack(self, padded: Tensor) -> Tensor:
        """[T, B, F] -> [N, F]."""
        return padded.reshape(self.steps * self.batch, padded.size(2)).index_select(0, self.rows)
