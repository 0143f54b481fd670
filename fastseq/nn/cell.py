"""fastseq.LSTMCell and fastseq.RNNCell: one step of the operations, with ``torch.nn``'s interface.

A cell is the sequence operation over a time axis of one. Whoever steps through a whole sequence in Python is served
better by the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from fastseq import functional as F
from fastseq.errors import ShapeError
from fastseq.nn import vendor
from fastseq.nn.rnn import MODES


class CellBase(nn.Module):
    """A cell's parameters, named and ordered as torch's: weight_ih [G·H, I], weight_hh [G·H, H], bias_* [G·H]."""

    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        gates: int,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.weight_ih = nn.Parameter(torch.empty((gates * hidden_size, input_size), device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty((gates * hidden_size, hidden_size), device=device, dtype=dtype))
        if bias:
            self.bias_ih = nn.Parameter(torch.empty(gates * hidden_size, device=device, dtype=dtype))
            self.bias_hh = nn.Parameter(torch.empty(gates * hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter anew, uniform in ±1/√hidden_size."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for weight in self.parameters():
            init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        shown = f"{self.input_size}, {self.hidden_size}"
        if self.bias is not True:
            shown += f", bias={self.bias}"
        nonlinearity = getattr(self, "nonlinearity", "tanh")
        return shown if nonlinearity == "tanh" else f"{shown}, nonlinearity={nonlinearity}"


class CellForward:
    """Checks that both cells share; a mixin over the attributes that ``torch.nn``'s cells have too."""

    input_size: int
    hidden_size: int
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Any  # Tensor | None; torch's class leaves it undeclared
    bias_hh: Any

    def _check(self, input: Tensor, states: tuple[Tensor, ...]) -> None:
        """torch's checks, in its order and words: input [B, I], states [B, H]."""
        if input.size(1) != self.input_size:
            raise ShapeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for index, state in enumerate(states):
            name = f"hidden{index}"
            if state.size(0) != input.size(0):
                raise ShapeError(f"Input batch size {input.size(0)} doesn't match {name} batch size {state.size(0)}")
            if state.dim() != 2 or state.size(1) != self.hidden_size:
                got = state.size(1) if state.dim() > 1 else f"a {state.dim()}-D tensor"
                raise ShapeError(f"{name} has inconsistent hidden_size: got {got}, expected {self.hidden_size}")
        for name, tensor in (("input", input), *((f"hidden{index}", state) for index, state in enumerate(states))):
            if tensor.device != self.weight_ih.device:
                raise ShapeError(
                    f"Expected all tensors to be on the same device, but found {name} on {tensor.device} "
                    f"and weight_ih on {self.weight_ih.device}"
                )
            if tensor.dtype != self.weight_ih.dtype and not torch._C._is_any_autocast_enabled():
                raise ShapeError(
                    f"expected {name} and weight_ih to have the same dtype, but got: "
                    f"{tensor.dtype} != {self.weight_ih.dtype}"
                )


class LSTMCellForward(CellForward):
    """The forward pass of :class:`LSTMCell`."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: input [B, I] and hx = (h, c), both [B, H], or all without B; returns the next (h, c)."""
        _check_rank("LSTMCell", "input", input)
        if hx is not None:
            if isinstance(hx, Tensor) or not isinstance(hx, Sequence):
                raise TypeError(f"hx: expected a tuple (h_0, c_0), got {type(hx).__name__}")
            if len(hx) != 2:
                raise ShapeError(f"lstm_cell expects two hidden states, hx = (h_0, c_0), got {len(hx)}")
            for index, state in enumerate(hx):
                _check_rank("LSTMCell", f"hx[{index}]", state)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            h = c = x.new_zeros(x.size(0), self.hidden_size)
        else:
            h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        self._check(x, (h, c))
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if vendor.serves(x, "LSTM"):
            h, c = vendor.run_lstm_cell(x, (h, c), *weights)
        elif c.dtype == torch.float32 and _autocasts(x):
            # As torch's cell does, keep a float32 cell state so under autocast: in the half type it would be rounded at
            # every step of the caller's loop.
            with torch.autocast(x.device.type, enabled=False):
                wide: list[Any] = [None if weight is None else weight.float() for weight in weights]
                _, h, c = F.lstm(x.unsqueeze(0).float(), h.float(), c, *wide)
        else:
            _, h, c = F.lstm(x.unsqueeze(0), h, c, *weights)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class RNNCellForward(CellForward):
    """The forward pass of :class:`RNNCell`."""

    nonlinearity: str

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input [B, I] and hx [B, H], or both without B; returns the next h."""
        _check_rank("RNNCell", "input", input)
        if hx is not None:
            _check_rank("RNNCell", "hidden", hx)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            hx = x.new_zeros(x.size(0), self.hidden_size)
        elif not batched:
            hx = hx.unsqueeze(0)
        self._check(x, (hx,))
        if self.nonlinearity not in MODES:  # torch finds it out here too, not at construction
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if vendor.serves(x, MODES[self.nonlinearity]):
            h = vendor.run_rnn_cell(self.nonlinearity, x, hx, *weights)
        else:
            _, h = F.rnn(x.unsqueeze(0), hx, *weights, nonlinearity=self.nonlinearity)
        return h if batched else h.squeeze(0)


class LSTMCell(LSTMCellForward, CellBase):
    """One step of an LSTM. Takes the place of :class:`torch.nn.LSTMCell`.

    Args:
        input_size: I, the number of features of the input.
        hidden_size: H, the number of cells.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device: where the parameters are made.
        dtype: their floating point type.

    Shapes of ``forward(input, hx=None) -> (h, c)``: input [B, I], hx = (h, c) of [B, H] each (zeros if None), or all
    of them without B.

    Raises:
        fastseq.ShapeError: a wrong rank, size, dtype or device, beginning with torch's words.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)


class RNNCell(RNNCellForward, CellBase):
    """One step of an Elman network. Takes the place of :class:`torch.nn.RNNCell`.

    Args:
        input_size: I, the number of features of the input.
        hidden_size: H, the number of units.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"``, ``"relu"`` or ``"sigmoid"`` (the logistic function, which torch does not have here).
        device: where the parameters are made.
        dtype: their floating point type.

    Shapes of ``forward(input, hx=None) -> h``: input [B, I], hx and h [B, H] (zeros if None), or all of them without B.

    Raises:
        fastseq.ShapeError: a wrong rank, size, dtype or device, beginning with torch's words.
        TypeError: an argument of the wrong type.
        RuntimeError: an unknown nonlinearity, at the first forward, as torch's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity


def _check_rank(cell: str, name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{cell}: {name}: expected a Tensor, got {type(value).__name__}")
    if value.dim() not in (1, 2):
        raise ShapeError(f"{cell}: Expected {name} to be 1D or 2D, got {value.dim()}D instead")


def _autocasts(x: Tensor) -> bool:
    # The first question spares the second, which raises for devices that autocast does not know (meta).
    return bool(torch._C._is_any_autocast_enabled()) and torch.is_autocast_enabled(x.device.type)
