"""A launcher for a whole stack of plain layers in one direction, of which nothing but the results is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import STORAGE, new_output
from fastseq.cpu.rnn import ACTIVATIONS


def forward(
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor | None],
    layers: int,
    widths: tuple[int, ...],
    hidden: int,
    nonlinearity: str | None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """y [T, B, P] and the last states [L, B, ·]; None where a tensor is not as the kernels need it.

    Args:
        x: [T, B, I], on the CPU.
        states: those to start from, one for each of ``widths``, [L, B, ·]; zeros if None.
        weights: of all layers, of each w_ih, w_hh, b_ih and b_hh if there are biases, w_hr if h is projected.
        layers: L.
        widths: of the states, (P, H) of an LSTM, (H,) of an Elman RNN.
        hidden: H.
        nonlinearity: of an Elman RNN; None for the LSTM.
    """
    dtype, outputs = x.dtype, widths[0]
    steps, batch, inputs = x.shape
    stride_t, stride_b, stride_i = x.stride()
    kernel, activation = _cpu.lstm_forward, 0
    if nonlinearity is not None:
        kernel, activation = _cpu.rnn_forward, ACTIVATIONS[nonlinearity]
    storage = STORAGE.get(dtype)
    if storage is None or batch == 0 or (stride_i != 1 and inputs > 1):
        return None
    for state, width in zip(states or (), widths, strict=False):
        if state.shape != (layers, batch, width) or state.dtype is not dtype or not state.is_contiguous():
            return None
    rows = hidden if nonlinearity is not None else 4 * hidden
    each = len(weights) // layers
    biased, projected = each >= 4, each % 2 == 1
    shapes = [(rows, inputs), (rows, outputs), *[(rows,)] * (2 * biased), *[(outputs, hidden)] * projected]
    addresses = []
    for place, weight in enumerate(weights):
        if place == each:
            shapes[0] = (rows, outputs)
        if (
            weight is None
            or weight.shape != shapes[place % each]
            or weight.dtype is not dtype
            or not weight.is_contiguous()
        ):
            return None
        addresses.append(weight.data_ptr())

    finals = tuple([x.new_empty((layers, batch, width)) for width in widths])
    initial = _addresses(states, dtype, layers, batch, widths)
    last = _addresses(finals, dtype, layers, batch, widths)
    threads = torch.get_num_threads()
    for layer in range(layers):
        y = new_output(x, (steps, batch, outputs))
        w_ih, w_hh, *rest = addresses[layer * each : (layer + 1) * each]
        b_ih, b_hh = rest[:2] if biased else (0, 0)
        kernel(
            storage,
            activation,
            (steps, batch, inputs, hidden, outputs),
            x.data_ptr(),
            stride_t,
            stride_b,
            *initial[layer],
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            rest[-1] if projected else 0,
            0,  # no flags
            False,  # not in reverse
            y.data_ptr(),
            *last[layer],
            0,  # no tape
            0,
            None,  # no options
            True,
            threads,
        )
        x, inputs, stride_t, stride_b = y, outputs, batch * outputs, outputs
    return x, finals


def _addresses(
    states: tuple[Tensor, ...] | None, dtype: torch.dtype, layers: int, batch: int, widths: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Of each layer, where its h and c are, each [B, ·]; 0 for what there is not."""
    if states is None:
        return [(0, 0)] * layers
    starts = [state.data_ptr() for state in states]
    sizes = [batch * width * dtype.itemsize for width in widths]
    if len(states) == 1:
        return [(starts[0] + layer * sizes[0], 0) for layer in range(layers)]
    return [(starts[0] + layer * sizes[0], starts[1] + layer * sizes[1]) for layer in range(layers)]
