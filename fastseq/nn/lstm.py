"""fastseq.LSTM: ``torch.nn.LSTM`` over fastseq's operation, with lengths and resets."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import functional as F
from fastseq.errors import ShapeError
from fastseq.nn.base import RecurrentBase
from fastseq.nn.forward import RecurrentForward


class LSTMForward(RecurrentForward):
    """The forward pass of the LSTM, for :class:`LSTM` and for ``nn.LSTM`` instances converted with their type kept."""

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: None = None,
        reset: Tensor | None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Runs all layers over the sequence; see the class for the shapes."""
        output, (h_n, c_n) = self._run(input, _pair(hx), lengths, reset)
        return output, (h_n, c_n)

    def _direction(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: dict[str, Tensor],
        reverse: bool,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, ...]:
        h0, c0 = states
        return F.lstm(x, h0, c0, **weights, reverse=reverse, lengths=lengths, reset=reset)

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _check_state_rank(self, states: tuple[Tensor, ...], batched: bool) -> None:
        expected = 3 if batched else 2
        if any(state.dim() != expected for state in states):
            raise ShapeError(
                f"For {'batched' if batched else 'unbatched'} {expected}-D input, hx and cx should also be "
                f"{expected}-D but got ({states[0].dim()}-D, {states[1].dim()}-D) tensors"
            )


class LSTM(LSTMForward, RecurrentBase):
    r"""A multi-layer long short-term memory network (Hochreiter & Schmidhuber 1997; forget gates: Gers et al. 2000).

    Takes the place of :class:`torch.nn.LSTM`: the same arguments, parameters, initial values for the same seed, shapes,
    and errors. For each step, layer and direction::

        i, f, g, o = σ, σ, tanh, σ of (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), split in four
        c_t = f ∘ c_{t-1} + i ∘ g
        h_t = o ∘ tanh(c_t)                 with proj_size: h_t = W_hr (o ∘ tanh(c_t))   (Sak et al. 2014)

    Args:
        input_size: I, the number of features of the input.
        hidden_size: H, the number of cells.
        num_layers: L, layers stacked upon one another.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: whether input and output are [B, T, ·] and not [T, B, ·]. The states never are.
        dropout: probability of zeroing an element of each layer's output but the last one's, in training.
        bidirectional: whether a second stack reads the sequence backwards; D is then 2.
        proj_size: P, if positive the width of h; else P = H.
        device: where the parameters are made.
        dtype: their floating point type.

    Shapes of ``forward(input, hx=None, *, lengths=None, reset=None) -> (output, (h_n, c_n))``:
        - input: [T, B, I], [B, T, I] if ``batch_first``, [T, I] without a batch, or a ``PackedSequence``.
        - hx: ``(h_0, c_0)`` of shapes [L·D, B, P] and [L·D, B, H] (no B without a batch); zeros if None.
        - lengths: integer [B] (0-d without a batch), on any device, unsorted, zeros allowed: the output is zero past
          each sequence's end, and ``h_n`` and ``c_n`` are those of its last valid step. None for a ``PackedSequence``.
        - reset: bool [T, B] ([B, T] if ``batch_first``, [T] without a batch; for a ``PackedSequence`` padded to its
          longest, in the order of ``hx``): before step t where true, the state is zero and no gradient crosses.
        - output: [T, B, D·P], laid out as the input. ``h_n``, ``c_n``: as hx.

    Raises:
        fastseq.ShapeError: an input or a state of the wrong rank, size, dtype or device. It is both a ``ValueError``
            and a ``RuntimeError``, and begins with torch's words.
        TypeError: an argument of the wrong type.
        ValueError: a constructor argument out of range, with torch's words.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )

    if TYPE_CHECKING:
        # nn.Module.__call__ is typed to return Any; the overloads are worth more to the caller.
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: tuple[Tensor, Tensor] | None = None,
            *,
            lengths: Tensor | None = None,
            reset: Tensor | None = None,
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: tuple[Tensor, Tensor] | None = None,
            *,
            lengths: None = None,
            reset: Tensor | None = None,
        ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

        def __call__(self, *args: object, **kwargs: object) -> object: ...


def _pair(hx: object) -> tuple[Tensor, Tensor] | None:
    """hx as a tuple of two tensors."""
    if hx is None:
        return None
    if isinstance(hx, Tensor):
        raise ShapeError(f"hx: expected a tuple (h_0, c_0), got one tensor of shape {tuple(hx.shape)}")
    if not isinstance(hx, (tuple, list)) or not all(isinstance(state, Tensor) for state in hx):
        raise TypeError(f"hx: expected a tuple (h_0, c_0) of tensors, got {type(hx).__name__}")
    if len(hx) != 2:
        raise ShapeError(f"lstm expects two hidden states, hx = (h_0, c_0), got {len(hx)}")
    return hx[0], hx[1]
