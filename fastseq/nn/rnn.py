"""fastseq.RNN: ``torch.nn.RNN`` over fastseq's operation, with what torch's lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq.errors import ShapeError
from fastseq.nn.base import RecurrentBase
from fastseq.nn.forward import Extras, RecurrentForward
from fastseq.ops import rnn as op

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}


class RNNStates(NamedTuple):
    """Every state of an RNN, layer by layer and direction by direction, zero past the end of a sequence.

    Attributes:
        h: [L·D, T, B, H]; [L·D, B, T, H] if ``batch_first``, [L·D, T, H] without a batch. Time in input order.
    """

    h: Tensor


class RNNForward(RecurrentForward):
    """The forward pass of the Elman network, for :class:`RNN` and ``nn.RNN``s converted with their type kept."""

    if TYPE_CHECKING:
        nonlinearity: str

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_states: bool = False,
    ) -> Any: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs all layers over the sequence; see the class for the shapes."""
        resets = None if reset_state is None else (reset_state,)
        extras = Extras(lengths, reset, resets, return_states)
        output, (h_n,), everything = self._run(input, _single(hx), extras)
        return (output, h_n, RNNStates(*everything)) if return_states else (output, h_n)

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of a stream, as :meth:`fastseq.LSTM.step`.

        Args:
            x_t: [B, I] or [I].
            state: h, [L, B, H] or [L, H]; zeros if None.

        Returns:
            y_t [B, H] or [H], and the next state.
        """
        if not torch.compiler.is_compiling() and self._packed is not None and type(state) is Tensor:
            done = None if self._alters_layers() else self._packed.repeat(self, x_t, (state,))
            if done is not None:
                return done[0], done[1][0]
        y_t, (h,) = self._step(x_t, _single(state))
        return y_t, h

    def _step_nonlinearity(self) -> str | None:
        return self.nonlinearity

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
        (h0,) = states
        biases = weights.get("b_ih"), weights.get("b_hh")
        return op.layer(
            x,
            h0,
            weights["w_ih"],
            weights["w_hh"],
            *biases,
            self.nonlinearity,
            flags,
            reverse,
            None if resets is None else resets[0],
            self._recurrent_mask(x, h0.size(1)),
            self.grad_clip,
            self.recompute,
        )

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _check_state_rank(self, states: tuple[Tensor, ...], batched: bool) -> None:
        expected = 3 if batched else 2
        if states[0].dim() != expected:
            raise ShapeError(
                f"For {'batched' if batched else 'unbatched'} {expected}-D input, hx should also be {expected}-D "
                f"but got {states[0].dim()}-D tensor"
            )


class RNN(RNNForward, RecurrentBase):
    r"""A multi-layer Elman network (Elman 1990), h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Takes the place of :class:`torch.nn.RNN`: the same arguments, parameters, initial values for the same seed, shapes,
    and errors.

    Args:
        input_size: I, the number of features of the input.
        hidden_size: H, the number of units.
        num_layers: L, layers stacked upon one another.
        nonlinearity: f, ``"tanh"``, ``"relu"`` or ``"sigmoid"`` (the logistic function, which torch lacks here).
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: whether input and output are [B, T, ·] and not [T, B, ·]. The state never is.
        dropout: probability of zeroing an element of each layer's output but the last one's, in training.
        bidirectional: whether a second stack reads the sequence backwards; D is then 2.
        device: where the parameters are made.
        dtype: their floating point type.
        proj_size: not an argument of the RNN; named so that giving it raises torch's error.
        recurrent_dropout, grad_clip, recompute: as of :class:`fastseq.LSTM`.

    Shapes of ``forward(input, hx=None, *, lengths=None, reset=None, reset_state=None, return_states=False)``, which
    returns ``(output, h_n)``, and with ``return_states`` :class:`RNNStates`: as :class:`fastseq.LSTM`'s, with one state
    hx, h_n, reset_state [L·D, B, H].

    Raises:
        fastseq.ShapeError: an input or a state of the wrong rank, size, dtype or device. It is both a ``ValueError``
            and a ``RuntimeError``, and begins with torch's words.
        TypeError: an argument of the wrong type.
        ValueError: a constructor argument out of range, with torch's words.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: None = None,
        recurrent_dropout: float = 0.0,
        grad_clip: float | None = None,
        recompute: bool = False,
    ) -> None:
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in MODES:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh', 'relu' or 'sigmoid'.")
        super().__init__(
            MODES[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            recurrent_dropout,
            grad_clip,
            recompute,
        )
        self.nonlinearity = nonlinearity

    def extra_repr(self) -> str:
        # torch shows no nonlinearity here; the one that torch lacks is shown.
        shown = super().extra_repr()
        return f"{shown}, nonlinearity=sigmoid" if self.nonlinearity == "sigmoid" else shown

    if TYPE_CHECKING:
        # nn.Module.__call__ is typed to return Any; the overloads are worth more to the caller.
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: Tensor | None = None,
            *,
            lengths: Tensor | None = None,
            reset: Tensor | None = None,
            reset_state: Tensor | None = None,
            return_states: Literal[False] = False,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: Tensor | None = None,
            *,
            lengths: None = None,
            reset: Tensor | None = None,
            reset_state: Tensor | None = None,
            return_states: Literal[False] = False,
        ) -> tuple[PackedSequence, Tensor]: ...

        @overload
        def __call__(
            self,
            input: Tensor,
            hx: Tensor | None = None,
            *,
            lengths: Tensor | None = None,
            reset: Tensor | None = None,
            reset_state: Tensor | None = None,
            return_states: Literal[True],
        ) -> tuple[Tensor, Tensor, RNNStates]: ...

        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: Tensor | None = None,
            *,
            lengths: None = None,
            reset: Tensor | None = None,
            reset_state: Tensor | None = None,
            return_states: Literal[True],
        ) -> tuple[PackedSequence, Tensor, RNNStates]: ...

        def __call__(self, *args: object, **kwargs: object) -> object: ...


def _single(hx: object) -> tuple[Tensor] | None:
    """hx as a tuple of one tensor."""
    if hx is None:
        return None
    if not isinstance(hx, Tensor):
        raise TypeError(f"hx: expected a Tensor, got {type(hx).__name__}")
    return (hx,)
