"""How a stack of recurrent layers runs: checks, layouts, and one call of the operation per layer and direction.

A mixin with no state of its own but the packed weights of ``step``: it reads the attributes that ``torch.nn.LSTM`` has
too, so that ``fastseq.LSTM`` and what ``convert(keep_type=True)`` makes of an ``nn.LSTM`` share one forward.
Everything runs time-major inside; ``batch_first``, unbatched and packed input differ only at the two ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastseq.errors import ShapeError
from fastseq.nn import inference, vendor
from fastseq.nn.packing import Packing
from fastseq.nn.streaming import Form, PackedStep
from fastseq.ops.checks import refuse_shape
from fastseq.ops.flags import checked_flags, step_flags

# The mixins stand before nn.Module or a subclass of it, and call what it has.
if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


@dataclass
class Extras:
    """What a call may bring beside input and states, in the layout of the operation (time-major, packed order).

    Attributes:
        lengths: [B].
        reset: bool [T, B].
        reset_states: like the states, each [L·D, B, ·] or [T, L·D, B, ·].
        return_states: whether all states shall be returned.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_states: tuple[Tensor, ...] | None = None
    return_states: bool = False


class RecurrentForward(_Module):
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

    # What fastseq has beyond torch.nn: off in a converted module, which may switch it on.
    recurrent_dropout: float = 0.0
    grad_clip: float | None = None
    recompute: bool = False

    _packed: PackedStep | None = None

    # What differs between the two, supplied by LSTMForward and RNNForward.

    def _direction(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: Mapping[str, Tensor],
        flags: Tensor | None,
        reverse: bool,
        resets: tuple[Tensor, ...] | None,
        return_states: bool,
    ) -> tuple[Tensor, ...]:
        """One layer in one direction: x [T, B, ·] -> y [T, B, P], the last states [B, ·], and all states if asked.

        ``resets`` are reset states, each [B, ·] or [T, B, ·].
        """
        raise NotImplementedError

    def _state_sizes(self) -> tuple[int, ...]:
        """The width of each state: (P, H) for the LSTM, (H,) for the RNN."""
        raise NotImplementedError

    def _check_state_rank(self, states: tuple[Tensor, ...], batched: bool) -> None:
        raise NotImplementedError

    def _extra_stems(self) -> tuple[str, ...]:
        """The stems of the parameters that torch.nn does not have, such as ``weight_peephole``."""
        return ()

    def _uses_options(self) -> bool:
        """Whether the module computes something that torch.nn's does not."""
        return (self.recurrent_dropout > 0 and self.training) or self.grad_clip is not None or self.recompute

    def _alters_layers(self) -> bool:
        """Whether without gradients the module computes something else than plain layers, at least by chance."""
        return bool(self.training and (self.dropout or self.recurrent_dropout))

    def _step_nonlinearity(self) -> str | None:
        """Of an Elman layer; None for the LSTM."""
        raise NotImplementedError

    # The public forward of both ends here.

    def _run(
        self, input: Tensor | PackedSequence, states: tuple[Tensor, ...] | None, extras: Extras
    ) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Output, last states, and all states: h [L·D, T, B, P], …, time and batch in the layout of the input."""
        if extras.reset_states is not None and extras.reset is None:
            raise ValueError("reset_state: expected None without reset: there is no step that would take it")
        if isinstance(input, PackedSequence):
            return self._run_packed(input, states, extras)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
        return self._run_padded(input, states, extras)

    def _run_padded(
        self, input: Tensor, states: tuple[Tensor, ...] | None, extras: Extras
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
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
        if states is not None:
            states = self._initial(x, batch, states)
        if steps == 0:
            raise ShapeError(
                "Expected sequence length to be larger than 0 in RNN: input has an empty time axis, "
                f"shape {tuple(input.shape)}"
            )
        if extras.lengths is not None:
            lengths = _time_argument("lengths", extras.lengths, "[B]" if batched else "[]", (batch,) if batched else ())
            extras.lengths = lengths if batched else lengths.unsqueeze(0)
        if extras.reset is not None:
            extras.reset = self._time_major_reset(extras.reset, steps, batch, batched)
        if extras.reset_states is not None:
            extras.reset_states = self._batched_resets(extras.reset_states, steps, batch, batched)

        everything: tuple[Tensor, ...] = ()
        plain = extras.lengths is None and extras.reset is None and not extras.return_states
        done = inference.run(self, x, states) if plain else None
        if done is not None:
            y, finals = done
        elif self._served_by_vendor(x, extras):
            y, finals = vendor.run(self, x, self._initial(x, batch, states))
        else:
            y, finals, everything = self._stack(x, states, extras, None)
        if not batched:
            finals = tuple(state.squeeze(1) for state in finals)
            return y.squeeze(1), finals, tuple(state.squeeze(2) for state in everything)
        if self.batch_first:
            return y.transpose(0, 1), finals, tuple(state.transpose(1, 2) for state in everything)
        return y, finals, everything

    def _run_packed(
        self, input: PackedSequence, states: tuple[Tensor, ...] | None, extras: Extras
    ) -> tuple[PackedSequence, tuple[Tensor, ...], tuple[Tensor, ...]]:
        if extras.lengths is not None:
            raise TypeError("lengths: expected None beside a PackedSequence, which carries its own, got a Tensor")
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_input(data, packed=True)
        packing = Packing.of(input)
        states = self._initial(data, packing.batch, states)
        if extras.reset is not None:
            extras.reset = self._time_major_reset(extras.reset, packing.steps, packing.batch, batched=True)
        if extras.reset_states is not None:
            extras.reset_states = self._batched_resets(extras.reset_states, packing.steps, packing.batch, batched=True)
        if sorted_indices is not None:  # the caller's order -> the packed order
            states = tuple(state.index_select(1, sorted_indices) for state in states)
            if extras.reset is not None:
                extras.reset = extras.reset.index_select(1, sorted_indices.to(extras.reset.device))
            if extras.reset_states is not None:
                extras.reset_states = tuple(state.index_select(-2, sorted_indices) for state in extras.reset_states)

        everything: tuple[Tensor, ...]
        if self._served_by_vendor(data, extras):
            y, finals, everything = *vendor.run(self, data, states, batch_sizes), ()
        else:
            extras.lengths = packing.lengths
            padded, finals, everything = self._stack(packing.pad(data), states, extras, packing)
            y = packing.pack(padded)
        if unsorted_indices is not None:
            finals = tuple(state.index_select(1, unsorted_indices) for state in finals)
            everything = tuple(state.index_select(2, unsorted_indices) for state in everything)
        if self.batch_first:
            everything = tuple(state.transpose(1, 2) for state in everything)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), finals, everything

    def _served_by_vendor(self, x: Tensor, extras: Extras) -> bool:
        return (
            vendor.serves(x, self.mode, extras.lengths, extras.reset)
            and not extras.return_states
            and not self._uses_options()
        )

    def _stack(
        self, x: Tensor, states: tuple[Tensor, ...] | None, extras: Extras, packing: Packing | None
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All layers: x [T, B, I], states [L·D, B, ·] -> y [T, B, D·P], last states [L·D, B, ·], all [L·D, T, B, ·].

        Without states all layers start from the same zeros.
        """
        directions = 2 if self.bidirectional else 1
        flags = _flags(x, extras, directions)
        sizes = self._state_sizes()
        count = len(sizes)
        zeros = {size: x.new_zeros((x.size(1), size)) for size in sizes} if states is None else {}
        finals: list[tuple[Tensor, ...]] = []
        everything: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                resets = extras.reset_states
                if resets is not None:
                    resets = tuple(state[k] if state.dim() == 3 else state[:, k] for state in resets)
                y, *rest = self._direction(
                    x,
                    tuple(zeros[size] for size in sizes) if states is None else tuple(state[k] for state in states),
                    self._weights(k),
                    flags[direction],
                    direction == 1,
                    resets,
                    extras.return_states,
                )
                outputs.append(y)
                finals.append(tuple(rest[:count]))
                if extras.return_states:
                    everything.append((y, *rest[count:]))
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
            if layer < self.num_layers - 1:
                x = self._dropout(x, packing)
        return x, _stacked(finals), tuple(torch.stack(each) for each in zip(*everything, strict=True))

    def _weights(self, k: int) -> dict[str, Tensor]:
        """The weights of layer and direction k as the operation names them: w_ih, w_hh, b_ih, …, peephole, …"""
        # Read by name at each call, never cached: parametrizations and torch.func.functional_call replace attributes.
        weights = {operand: getattr(self, name) for operand, name in self._weight_names(k).items()}
        suffix = self._all_weights[k][0].removeprefix("weight_ih")
        for stem in self._extra_stems():
            weights["peephole" if stem == "weight_peephole" else stem] = getattr(self, stem + suffix)
        return weights

    def _weight_names(self, k: int) -> dict[str, str]:
        """The parameters that torch's layer has too, of layer and direction k, by the operation's names."""
        biases = ("b_ih", "b_hh") if self.bias else ()
        projection = ("w_hr",) if self.proj_size > 0 else ()
        return dict(zip(("w_ih", "w_hh", *biases, *projection), self._all_weights[k], strict=True))

    def _recurrent_mask(self, x: Tensor, size: int) -> Tensor | None:
        """Recurrent dropout's mask [B, P] on h_{t-1}, one for all steps and gates; None where nothing is dropped."""
        if self.recurrent_dropout == 0 or not self.training:
            return None
        return torch.nn.functional.dropout(x.new_ones(x.size(1), size), self.recurrent_dropout)

    def _dropout(self, x: Tensor, packing: Packing | None) -> Tensor:
        if self.dropout == 0 or not self.training:
            return x
        if packing is None:
            return torch.nn.functional.dropout(x, self.dropout)
        # torch draws the mask over the packed rows; drawing it there too repeats its numbers under the same seed.
        return packing.pad(torch.nn.functional.dropout(packing.pack(x), self.dropout))

    # Streaming.

    def _step(self, x_t: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t: expected a Tensor, got {type(x_t).__name__}")
        if self.bidirectional:
            raise RuntimeError("step: a bidirectional layer reads from the end, which a stream does not have yet")
        if self.recurrent_dropout > 0 and self.training:
            raise RuntimeError(
                "step: recurrent dropout has one mask per sequence, and a step knows no sequence: call eval() before"
            )
        if x_t.dim() not in (1, 2):
            raise ShapeError(f"x_t: expected shape [B, I] or [I], got {list(x_t.shape)}")
        batched = x_t.dim() == 2
        if states is not None:
            self._check_state_rank(states, batched)
        x = x_t.unsqueeze(0) if batched else x_t.unsqueeze(0).unsqueeze(0)
        self._check_input(x)
        with_batch = None if states is None or batched else tuple(state.unsqueeze(1) for state in states)
        initial = self._initial(x, x.size(1), states if batched else with_batch)
        if not torch.compiler.is_compiling() and not self._alters_layers():
            given = initial if batched else tuple(state.squeeze(1) for state in initial)
            done = self._packed_step(x_t, given, x.size(1))
            if done is not None:
                return done
        if self._served_by_vendor(x, Extras()):
            y, finals = vendor.run(self, x, initial)
        else:
            y, finals, _ = self._stack(x, initial, Extras(), None)
        if batched:
            return y.squeeze(0), finals
        return y.squeeze(0).squeeze(0), tuple(state.squeeze(1) for state in finals)

    def _packed_step(
        self, x_t: Tensor, states: tuple[Tensor, ...], batch: int
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """A step with checked arguments from packed weights, packed anew if need be; None where they do not serve."""
        names = [self._weight_names(k) for k in range(self.num_layers)]
        size = self._state_sizes()[0]
        form: Form = (x_t.shape, tuple(state.shape for state in states), (*x_t.shape[:-1], size), batch)
        for packed in (self._packed, None):
            if packed is None:
                if not PackedStep.serves(self, names, x_t, states):
                    return None
                self._packed = packed = PackedStep(self, names, self._step_nonlinearity())
            done = packed.first(self, form, x_t, states)
            if done is not None:
                return done
        return None

    # What may change the weights in a way that the fingerprints do not see drops the packed ones.

    def train(self, mode: bool = True) -> Self:
        self._packed = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are this process's own: neither pickled nor copied.
        state: dict[str, Any] = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        state.pop("_packed", None)
        return state

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

    def _batched_resets(self, states: tuple[Tensor, ...], steps: int, batch: int, batched: bool) -> tuple[Tensor, ...]:
        """Reset states as the caller lays them out -> each [L·D, B, ·] or [T, L·D, B, ·]."""
        stacked = self.num_layers * (2 if self.bidirectional else 1)
        for index, (state, size) in enumerate(zip(states, self._state_sizes(), strict=True)):
            name = f"reset_state[{index}]" if self.mode == "LSTM" else "reset_state"
            if not isinstance(state, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(state).__name__}")
            shape = (stacked, batch, size) if batched else (stacked, size)
            if state.shape not in (shape, (steps, *shape)):
                refuse_shape(name, f"the shape {list(shape)} of hx, or with a leading T {[steps, *shape]}", state.shape)
        return states if batched else tuple(state.unsqueeze(-2) for state in states)


def _stacked(states: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The states of each layer and direction -> each [L·D, …]; those of a single one are not copied."""
    if len(states) == 1:
        return tuple(state.unsqueeze(0) for state in states[0])
    return tuple(torch.stack(each) for each in zip(*states, strict=True))


def _flags(x: Tensor, extras: Extras, directions: int) -> list[Tensor | None]:
    """Step flags for each direction: made once for all layers."""
    if extras.lengths is None and extras.reset is None:
        return [None] * directions
    forward = checked_flags(x, extras.lengths, extras.reset, False)
    if directions == 1:
        return [forward]
    return [forward, step_flags(extras.lengths, extras.reset, x.size(0), x.size(1), True, x.device)]


def _time_argument(name: str, value: Tensor, letters: str, shape: tuple[int, ...]) -> Tensor:
    # Checked here although the operation checks it too: only here is the caller's layout known, and a message about the
    # transposed or unsqueezed tensor would name a shape that the caller never wrote.
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.shape != shape:
        refuse_shape(name, f"shape {letters} = {list(shape)}", value.shape)
    return value
