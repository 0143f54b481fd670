"""How a stack of recurrent layers runs: checks, layouts, and one call of the operation per layer and direction.

A mixin with no state of its own: it reads the attributes that ``torch.nn.LSTM`` has too, so that
``fastseq.LSTM`` and what ``convert(keep_type=True)`` makes of an ``nn.LSTM`` share one forward.
Everything runs time-major inside; ``batch_first``, unbatched and packed input differ only at the two ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq.errors import ShapeError
from fastseq.nn import vendor
from fastseq.nn.packing import Packing
from fastseq.ops.checks import refuse_shape


class RecurrentForward:
    """The forward pass of LSTM and RNN over hidden states given as a tuple: (h, c) for the LSTM, (h,) for the RNN."""

    if TYPE_CHECKING:
        mode: str
        input_size: int
        hidden_size: int
        num_layers: int
        bias: bool
        batch_first: bool
        dropout: float
        bidirectional: bool
        proj_size: int
        training: bool
        _all_weights: list[list[str]]

    # What differs between the two, supplied by LSTMForward and RNNForward.

    def _direction(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: dict[str, Tensor],
        reverse: bool,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """One layer in one direction: x [T, B, ·] -> y [T, B, P] and the last states [B, ·]."""
        raise NotImplementedError

    def _state_sizes(self) -> tuple[int, ...]:
        """The width of each state: (P, H) for the LSTM, (H,) for the RNN."""
        raise NotImplementedError

    def _check_state_rank(self, states: tuple[Tensor, ...], batched: bool) -> None:
        raise NotImplementedError

    # The public forward of both ends here.

    def _run(
        self,
        input: Tensor | PackedSequence,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Any, tuple[Tensor, ...]]:
        if isinstance(input, PackedSequence):
            return self._run_packed(input, states, lengths, reset)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
        return self._run_padded(input, states, lengths, reset)

    def _run_padded(
        self, input: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if input.dim() not in (2, 3):
            what = f"got {input.dim()}D instead" if self.mode == "LSTM" else f"got {input.dim()}D tensor instead"
            name = "LSTM" if self.mode == "LSTM" else "RNN"
            raise ShapeError(f"{name}: Expected input to be 2D or 3D, {what}")
        batched = input.dim() == 3
        if states is not None:
            self._check_state_rank(states, batched)
        if batched:
            x = input.transpose(0, 1) if self.batch_first else input
        else:  # batch_first means nothing without a batch
            x = input.unsqueeze(1)
            states = None if states is None else tuple(state.unsqueeze(1) for state in states)
        self._check_input(x)
        steps, batch = x.size(0), x.size(1)
        states = self._initial(x, batch, states)
        if steps == 0:
            raise ShapeError(
                "Expected sequence length to be larger than 0 in RNN: input has an empty time axis, "
                f"shape {tuple(input.shape)}"
            )
        if lengths is not None:
            lengths = _time_argument("lengths", lengths, "[B]" if batched else "[]", (batch,) if batched else ())
            lengths = lengths if batched else lengths.unsqueeze(0)
        if reset is not None:
            reset = self._time_major_reset(reset, steps, batch, batched)

        if vendor.serves(x, self.mode, lengths, reset):
            y, finals = vendor.run(self, x, states)
        else:
            y, finals = self._stack(x, states, lengths, reset, None)
        if not batched:
            return y.squeeze(1), tuple(state.squeeze(1) for state in finals)
        return (y.transpose(0, 1) if self.batch_first else y), finals

    def _run_packed(
        self, input: PackedSequence, states: tuple[Tensor, ...] | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[PackedSequence, tuple[Tensor, ...]]:
        if lengths is not None:
            raise TypeError("lengths: expected None beside a PackedSequence, which carries its own, got a Tensor")
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_input(data, packed=True)
        packing = Packing.of(input)
        states = self._initial(data, packing.batch, states)
        if sorted_indices is not None:  # the caller's order -> the packed order
            states = tuple(state.index_select(1, sorted_indices) for state in states)
        if reset is not None:
            reset = self._time_major_reset(reset, packing.steps, packing.batch, batched=True)
            reset = reset if sorted_indices is None else reset.index_select(1, sorted_indices.to(reset.device))

        if vendor.serves(data, self.mode, None, reset):
            y, finals = vendor.run(self, data, states, batch_sizes)
        else:
            padded, finals = self._stack(packing.pad(data), states, packing.lengths, reset, packing)
            y = packing.pack(padded)
        if unsorted_indices is not None:
            finals = tuple(state.index_select(1, unsorted_indices) for state in finals)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), finals

    def _stack(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        lengths: Tensor | None,
        reset: Tensor | None,
        packing: Packing | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers: x [T, B, I], states [L·D, B, ·] -> y [T, B, D·P], last states [L·D, B, ·]."""
        directions = 2 if self.bidirectional else 1
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                weights = self._weights(k)
                y, *last = self._direction(
                    x, tuple(state[k] for state in states), weights, direction == 1, lengths, reset
                )
                outputs.append(y)
                finals.append(tuple(last))
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
            if layer < self.num_layers - 1:
                x = self._dropout(x, packing)
        return x, tuple(torch.stack(each) for each in zip(*finals, strict=True))

    def _weights(self, k: int) -> dict[str, Tensor]:
        """The weights of layer and direction k as the operation names them: w_ih, w_hh, b_ih, b_hh, w_hr."""
        # Read by name at each call, never cached: parametrizations and torch.func.functional_call replace attributes.
        biases = ("b_ih", "b_hh") if self.bias else ()
        projection = ("w_hr",) if self.proj_size > 0 else ()
        names = zip(("w_ih", "w_hh", *biases, *projection), self._all_weights[k], strict=True)
        return {operand: getattr(self, name) for operand, name in names}

    def _dropout(self, x: Tensor, packing: Packing | None) -> Tensor:
        if self.dropout == 0 or not self.training:
            return x
        if packing is None:
            return torch.nn.functional.dropout(x, self.dropout)
        # torch draws the mask over the packed rows; drawing it there too repeats its numbers under the same seed.
        return packing.pad(torch.nn.functional.dropout(packing.pack(x), self.dropout))

    # Checks: torch's, in its words. The operation checks the rest.

    def _check_input(self, x: Tensor, packed: bool = False) -> None:
        weight: Tensor = getattr(self, self._all_weights[0][0])
        if x.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ShapeError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        expected = 2 if packed else 3
        if x.dim() != expected:
            raise ShapeError(f"input must have {expected} dimensions, got {x.dim()}")
        if x.size(-1) != self.input_size:
            raise ShapeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(-1)}"
            )
        if x.device != weight.device:
            raise ShapeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{x.device} and parameter tensor at {weight.device}"
            )

    def _initial(self, x: Tensor, batch: int, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """The states to start from, checked, or zeros; each [L·D, B, ·]."""
        stacked = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(stacked, batch, size) for size in self._state_sizes()]
        if states is None:
            return tuple(x.new_zeros(shape) for shape in shapes)
        for index, (state, shape) in enumerate(zip(states, shapes, strict=True)):
            name = f"hidden[{index}]" if self.mode == "LSTM" else "hidden"
            if tuple(state.shape) != shape:
                size = "hidden size" if self.mode != "LSTM" else f"{name} size"
                raise ShapeError(f"Expected {size} {shape}, got {list(state.shape)}")
            if state.device != x.device:
                raise ShapeError(
                    "Input and hidden tensors are not at the same device, found input tensor at "
                    f"{x.device} and hidden tensor at {state.device}"
                )
            if state.dtype != x.dtype and not torch._C._is_any_autocast_enabled():
                raise ShapeError(
                    f"Input and hidden tensors are not of the same dtype, found input tensor of {x.dtype} "
                    f"and {name} of {state.dtype}"
                )
        return states

    def _time_major_reset(self, reset: Tensor, steps: int, batch: int, batched: bool) -> Tensor:
        """reset as the caller lays it out -> [T, B]."""
        if not batched:
            return _time_argument("reset", reset, "[T]", (steps,)).unsqueeze(1)
        if self.batch_first:
            return _time_argument("reset", reset, "[B, T]", (batch, steps)).transpose(0, 1)
        return _time_argument("reset", reset, "[T, B]", (steps, batch))


def _time_argument(name: str, value: Tensor, letters: str, shape: tuple[int, ...]) -> Tensor:
    # Checked here although the operation checks it too: only here is the caller's layout known, and a message about the
    # transposed or unsqueezed tensor would name a shape that the caller never wrote.
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.shape != shape:
        refuse_shape(name, f"shape {letters} = {list(shape)}", value.shape)
    return value
