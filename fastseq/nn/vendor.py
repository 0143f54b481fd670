"""torch's own recurrent layers on CUDA tensors (cuDNN), until kernels of fastseq's have been verified on a GPU.

Serves only what torch has: no ``lengths``, no ``reset``, tanh and relu. The rest goes through the operations, and so
does everything when FASTSEQ_IMPL or ``fastseq.testing.use_implementation`` names an implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseq.ops import dispatch

_LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": torch._VF.lstm,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}


def serves(x: Tensor, mode: str, lengths: Tensor | None = None, reset: Tensor | None = None) -> bool:
    """Whether torch's own path runs this module: a CUDA tensor, nothing forced, no option that torch lacks."""
    return x.is_cuda and lengths is None and reset is None and mode in _LAYERS and dispatch.forced() is None


def run(
    module: Any, x: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers at once: x [T, B, I], or packed rows [N, I] with batch_sizes; states [L·D, B, ·].

    Returns:
        y, laid out as x, and the tuple of last states.
    """
    weights = [getattr(module, name) for name in module._flat_weights_names]
    hx = states if module.mode == "LSTM" else states[0]
    settings = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
    layers = _LAYERS[module.mode]
    if batch_sizes is None:
        y, *finals = layers(x, hx, weights, *settings, False)  # time-major: batch_first is False
    else:
        y, *finals = layers(x, batch_sizes, hx, weights, *settings)
    return y, tuple(finals)


def run_lstm_cell(
    x: Tensor, hx: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step: x [B, I], hx (h, c) of [B, H] each -> the next (h, c)."""
    h, c = torch._VF.lstm_cell(x, hx, w_ih, w_hh, b_ih, b_hh)
    return h, c


def run_rnn_cell(
    nonlinearity: str, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor:
    """One step: x [B, I], h [B, H] -> the next h; nonlinearity is "tanh" or "relu"."""
    step = torch._VF.rnn_tanh_cell if nonlinearity == "tanh" else torch._VF.rnn_relu_cell
    h_next: Tensor = step(x, h, w_ih, w_hh, b_ih, b_hh)
    return h_next
