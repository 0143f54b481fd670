"""fastseq.RNN: ``torch.nn.RNN`` over fastseq's operation, with lengths, resets and the logistic nonlinearity."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import functional as F
from fastseq.errors import ShapeError
from fastseq.nn.base import RecurrentBase
from fastseq.nn.forward import RecurrentForward

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}


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
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: None = None,
        reset: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers over the sequence; see the class for the shapes."""
        if hx is not None and not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(hx).__name__}")
        output, (h_n,) = self._run(input, None if hx is None else (hx,), lengths, reset)
        return output, h_n

    def _direction(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: dict[str, Tensor],
        reverse: bool,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return F.rnn(
            x, *states, **weights, nonlinearity=self.nonlinearity, reverse=reverse, lengths=lengths, reset=reset
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

    Shapes of ``forward(input, hx=None, *, lengths=None, reset=None) -> (output, h_n)``: as :class:`fastseq.LSTM`'s,
    with one state hx, h_n [L·D, B, H].

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
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: Tensor | None = None,
            *,
            lengths: None = None,
            reset: Tensor | None = None,
        ) -> tuple[PackedSequence, Tensor]: ...

        def __call__(self, *args: object, **kwargs: object) -> object: ...
