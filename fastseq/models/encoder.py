"""A sequence as one vector: the last valid hidden state of deep recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastseq.errors import ShapeError
from fastseq.models.layers import make_recurrent

DIRECTIONS = ("forward", "backward", "both")


class SequenceEncoder(nn.Module):
    """Encodes each sequence as the hidden state of the last layer after its last valid step.

    Args:
        input_size: I, the number of features of a step.
        hidden_size: H.
        num_layers: recurrent layers stacked upon one another.
        cell: ``"lstm"``, or ``"tanh"``, ``"relu"``, ``"sigmoid"`` for an Elman network.
        direction: ``"forward"``, whose last step is the sequence's last; ``"backward"``, which reads from its last
            valid step to its first; or ``"both"``, side by side.
        batch_first: whether the input is [B, T, I] and not [T, B, I].
        dropout: probability of zeroing an element between layers, in training.
        device: where the parameters are made.
        dtype: their floating point type.

    Attributes:
        output_size: width of the encoding, H or 2H.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        direction: str = "forward",
        batch_first: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {', '.join(map(repr, DIRECTIONS))}, got {direction!r}")
        both = direction == "both"
        self.direction = direction
        self.batch_first = batch_first
        self.output_size = (2 if both else 1) * hidden_size
        self.recurrent = make_recurrent(
            cell, input_size, hidden_size, num_layers, dropout=dropout, bidirectional=both, device=device, dtype=dtype
        )

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encodes a batch.

        Args:
            input: [T, B, I], or [B, T, I] if ``batch_first``.
            lengths: integers [B], how many steps of each sequence are valid; all if None. A sequence of length 0 is
                encoded as zeros.

        Returns:
            [B, output_size]; forward before backward.

        Raises:
            fastseq.ShapeError: input or lengths of a wrong shape.
        """
        if input.dim() != 3:
            raise ShapeError(f"input: expected three dimensions, time, batch and features, got {list(input.shape)}")
        x = input.transpose(0, 1) if self.batch_first else input
        if self.direction == "backward":
            x = _reversed(x, lengths)
        _, state = self.recurrent(x) if lengths is None else self.recurrent(x, lengths=lengths)
        h_n: Tensor = state[0] if isinstance(state, tuple) else state  # [L·D, B, H]
        last = h_n[-2:] if self.direction == "both" else h_n[-1:]
        return last.transpose(0, 1).flatten(1)


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence with its valid steps in the opposite order, its padding where it was."""
    if lengths is None:
        return x.flip(0)
    if lengths.shape != x.shape[1:2]:
        raise ShapeError(f"lengths: expected shape [B] = [{x.size(1)}], got {list(lengths.shape)}")
    time = torch.arange(x.size(0), device=x.device).unsqueeze(1)
    mirrored = lengths.to(x.device) - 1 - time  # [T, B]
    order = torch.where(mirrored >= 0, mirrored, time)
    return x.gather(0, order.unsqueeze(2).expand_as(x))
