"""The recurrent layers that the models are made of, by name."""

from __future__ import annotations

from typing import Any

from fastseq.nn import LSTM, RNN
from fastseq.nn.rnn import MODES


def make_recurrent(
    cell: str, input_size: int, hidden_size: int, num_layers: int, *, dropout: float = 0.0, **options: Any
) -> Any:
    """``fastseq.LSTM`` for the cell ``"lstm"``, ``fastseq.RNN`` for ``"tanh"``, ``"relu"`` and ``"sigmoid"``.

    ``dropout`` is that between the layers, and means nothing for a single one. ``options`` are the layer's own.

    Raises:
        ValueError: no such cell, or an argument out of range.
    """
    between = dropout if num_layers > 1 else 0.0
    if cell == "lstm":
        return LSTM(input_size, hidden_size, num_layers, dropout=between, **options)
    if cell not in MODES:
        raise ValueError(f"cell: expected 'lstm', {', '.join(map(repr, MODES))}, got {cell!r}")
    return RNN(input_size, hidden_size, num_layers, nonlinearity=cell, dropout=between, **options)
