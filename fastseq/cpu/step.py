"""Launcher of the C++ step kernel: a stack of layers, one step at a time, from weights packed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import address, expect, storage_of
from fastseq.cpu.rnn import ACTIVATIONS


def pack(weights: Sequence[Mapping[str, Tensor]], nonlinearity: str | None) -> Any:
    """The packed weights of all layers; its ``run`` makes one step, or returns False where they no longer hold.

    Args:
        weights: of each layer ``w_ih``, ``w_hh``, and ``b_ih``, ``b_hh``, ``w_hr`` where it has them: dense, shapes as
            in :mod:`fastseq.ops.lstm` and :mod:`fastseq.ops.rnn`. They must stay where they are for as long as ``run``
            is called.
        nonlinearity: of an Elman layer; None for an LSTM.

    Raises:
        ValueError: a weight has another shape, dtype or device than the kernel assumes.
    """
    first = weights[0]
    dtype, inputs, outputs = first["w_ih"].dtype, first["w_ih"].shape[1], first["w_hh"].shape[1]
    gates = 4 if nonlinearity is None else 1
    hidden = first["w_ih"].shape[0] // gates
    for layer, of in enumerate(weights):
        expect(
            (
                ("w_ih", of["w_ih"], (gates * hidden, outputs if layer else inputs), dtype),
                ("w_hh", of["w_hh"], (gates * hidden, outputs), dtype),
                ("b_ih", of.get("b_ih"), (gates * hidden,), dtype),
                ("b_hh", of.get("b_hh"), (gates * hidden,), dtype),
                ("w_hr", of.get("w_hr"), (outputs, hidden), dtype),
            )
        )
    return _cpu.PackedStep(
        storage_of(first["w_ih"]),
        nonlinearity is None,
        0 if nonlinearity is None else ACTIVATIONS[nonlinearity],
        inputs,
        hidden,
        outputs,
        [tuple(address(of.get(name)) for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")) for of in weights],
    )
