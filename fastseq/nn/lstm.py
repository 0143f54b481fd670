"""fastseq.LSTM: ``torch.nn.LSTM`` over fastseq's operation, with what torch's lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq.errors import ShapeError
from fastseq.nn.base import RecurrentBase, checked_limit, checked_rate
from fastseq.nn.forward import Extras, RecurrentForward
from fastseq.ops import lstm as op
from fastseq.ops.checks import pair_of

# The parameters of each form of layer normalisation: their stems.
LAYER_NORMS = {
    "haste": ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c"),
    "torchaudio": ("weight_ln_gates", "bias_ln_gates", "weight_ln_c", "bias_ln_c"),
}


class States(NamedTuple):
    """Every state of an LSTM, layer by layer and direction by direction, zero past the end of a sequence.

    Attributes:
        h: [L·D, T, B, P]; [L·D, B, T, P] if ``batch_first``, [L·D, T, P] without a batch. Time in input order.
        c: the cell states, [L·D, T, B, H] likewise.
        gates: after activation, order i, f, g, o, [L·D, T, B, 4H] likewise.
    """

    h: Tensor
    c: Tensor
    gates: Tensor


Pair = tuple[Tensor, Tensor]


class LSTMForward(RecurrentForward):
    """The forward pass of the LSTM, for :class:`LSTM` and for ``nn.LSTM`` instances converted with their type kept."""

    zoneout: tuple[float, float] = (0.0, 0.0)
    peephole: bool = False
    layer_norm: str | None = None
    cell_clip: float | None = None

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Pair | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Pair | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Tensor, Pair]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Pair | None = None,
        *,
        lengths: None = None,
        reset: Tensor | None = None,
        reset_state: Pair | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, Pair]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Pair | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Pair | None = None,
        return_states: bool = False,
    ) -> Any: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Pair | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Pair | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs all layers over the sequence; see the class for the shapes."""
        resets = None if reset_state is None else pair_of("reset_state", reset_state)
        extras = Extras(lengths, reset, resets, return_states)
        output, (h_n, c_n), everything = self._run(input, _pair(hx), extras)
        return (output, (h_n, c_n), States(*everything)) if return_states else (output, (h_n, c_n))

    def step(self, x_t: Tensor, state: Pair | None = None) -> tuple[Tensor, Pair]:
        """One step of a stream: what :meth:`forward` gives for a sequence of one, from weights that are packed once.

        The packed weights are used when no gradient is wanted, and made anew when the weights have changed
        (:mod:`fastseq.nn.streaming` says how that is noticed).

        Args:
            x_t: [B, I] or [I].
            state: (h, c) as ``hx`` of :meth:`forward`: [L, B, P] and [L, B, H], or without B; zeros if None.

        Returns:
            y_t [B, P] or [P], and the next state.

        Raises:
            RuntimeError: the module is bidirectional, or has recurrent dropout and is in training mode.
            fastseq.ShapeError, TypeError: as :meth:`forward`.
        """
        if not torch.compiler.is_compiling() and self._packed is not None and type(state) is tuple:
            done: Any = None if self._alters_layers() else self._packed.repeat(self, x_t, state)
            if done is not None:
                return done  # type: ignore[no-any-return]
        y_t, (h, c) = self._step(x_t, _pair(state))
        return y_t, (h, c)

    def _extra_stems(self) -> tuple[str, ...]:
        peephole = ("weight_peephole",) if self.peephole else ()
        return peephole if self.layer_norm is None else (*peephole, *LAYER_NORMS[self.layer_norm])

    def _uses_options(self) -> bool:
        return (
            super()._uses_options()
            or self.peephole
            or self.layer_norm is not None
            or self.cell_clip is not None
            or self.zoneout != (0, 0)
        )

    def _alters_layers(self) -> bool:
        return (
            self.peephole
            or self.layer_norm is not None
            or self.cell_clip is not None
            or self.zoneout != (0, 0)
            or bool(self.training and (self.dropout or self.recurrent_dropout))
        )

    def _step_nonlinearity(self) -> str | None:
        return None

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
        h0, c0 = states
        named = (weights["w_ih"], weights["w_hh"], weights.get("b_ih"), weights.get("b_hh"), weights.get("w_hr"))
        if resets is None and not self._uses_options():
            return op.layer(x, h0, c0, *named, flags, reverse, None, self.recompute, return_states)
        zoneout_h, zoneout_c = self._zoneouts(x, *self._state_sizes())
        options = op.Options(
            h_reset=None if resets is None else resets[0],
            c_reset=None if resets is None else resets[1],
            h_mask=self._recurrent_mask(x, h0.size(1)),
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            peephole=weights.get("peephole"),
            weight_ln_ih=weights.get("weight_ln_ih"),
            weight_ln_hh=weights.get("weight_ln_hh"),
            weight_ln_gates=weights.get("weight_ln_gates"),
            bias_ln_gates=weights.get("bias_ln_gates"),
            weight_ln_c=weights.get("weight_ln_c"),
            bias_ln_c=weights.get("bias_ln_c"),
            cell_clip=self.cell_clip,
            grad_clip=self.grad_clip,
        )
        return op.layer(x, h0, c0, *named, flags, reverse, options, self.recompute, return_states)

    def _zoneouts(self, x: Tensor, *sizes: int) -> list[Tensor | float | None]:
        """Zoneout of h and of c: a mask [T, B, ·] in training, the rate in evaluation, None for the rate 0."""
        zoneouts: list[Tensor | float | None] = []
        for rate, size in zip(self.zoneout, sizes, strict=True):
            if rate == 0:
                zoneouts.append(None)
            elif self.training:
                shape = (x.size(0), x.size(1), size)
                zoneouts.append(torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(rate))
            else:
                zoneouts.append(rate)
        return zoneouts

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
        recurrent_dropout: probability of zeroing an element of h_{t-1} before the recurrent product, in training: one
            mask per sequence, for all steps and gates, scaled by 1/(1 - p) (Gal & Ghahramani 2016).
        zoneout: probability, or one for h and one for c, that an element of the state keeps its old value, in training
            (Krueger et al. 2017, eq. 5; h is made from the fresh cell). In evaluation the expectation.
        peephole: whether c enters the gates by learned diagonals (Gers & Schmidhuber 2000).
        layer_norm: None, ``"haste"`` or ``"torchaudio"``: two forms in use, named after their libraries, eps 1e-5.
        cell_clip: clips the cell state to ±cell_clip. In ``"torchaudio"`` before its normalisation.
        grad_clip: clips dL/dh_t elementwise to ±grad_clip at every step of backpropagation through time.
        recompute: whether the backward makes the gates again, instead of keeping them in memory. With ``layer_norm`` it
            always does.

    Parameters beyond torch's, one set per layer and direction, with its suffix (``_l0``, ``_l0_reverse``, …):
        - peephole: ``weight_peephole`` [3, H], rows i, f, o; i and f see c_{t-1}, o sees c_t. Not with layer_norm,
          since neither form has peepholes.
        - layer_norm="haste": the gates' sum is LN(W_ih x_t) ∘ ``weight_ln_ih`` + LN(W_hh h_{t-1}) ∘ ``weight_ln_hh`` +
          b, and h_t = o ∘ tanh(LN(c_t) ∘ ``weight_ln_c`` + ``bias_ln_c``); the raw c is carried.
        - layer_norm="torchaudio": the gates' sum is normalised as one, with ``weight_ln_gates`` and ``bias_ln_gates``
          [4H]; c_t = LN(f ∘ c_{t-1} + i ∘ g) ∘ ``weight_ln_c`` + ``bias_ln_c`` is carried.

    Shapes of ``forward(input, hx=None, *, lengths=None, reset=None, reset_state=None, return_states=False)``, which
    returns ``(output, (h_n, c_n))``, and with ``return_states`` a third result:
        - input: [T, B, I], [B, T, I] if ``batch_first``, [T, I] without a batch, or a ``PackedSequence``.
        - hx: ``(h_0, c_0)`` of shapes [L·D, B, P] and [L·D, B, H] (no B without a batch); zeros if None.
        - lengths: integer [B] (0-d without a batch), on any device, unsorted, zeros allowed: the output is zero past
          each sequence's end, and ``h_n`` and ``c_n`` are those of its last valid step. None for a ``PackedSequence``.
        - reset: bool [T, B] ([B, T] if ``batch_first``, [T] without a batch; for a ``PackedSequence`` padded to its
          longest, in the order of ``hx``): before step t where true, the state is zero, or that of ``reset_state``, and
          no gradient crosses. A step that follows the end of an episode is where it is true: t where ``done[t - 1]``.
        - reset_state: ``(h, c)`` shaped as hx, or with a leading T, row t for step t (never batch-first). They receive
          gradients. In the reverse direction the step that starts is the one before ``reset``, and takes its own row.
        - output: [T, B, D·P], laid out as the input. ``h_n``, ``c_n``: as hx.
        - :class:`States`: h, c and the gates of every step, which gradients pass through. For a ``PackedSequence``
          padded to its longest, in the order of ``hx``.

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
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        peephole: bool = False,
        layer_norm: str | None = None,
        cell_clip: float | None = None,
        grad_clip: float | None = None,
        recompute: bool = False,
    ) -> None:
        if not isinstance(peephole, bool):
            raise TypeError(f"peephole: expected a bool, got {type(peephole).__name__}")
        if layer_norm is not None and layer_norm not in LAYER_NORMS:
            raise ValueError(f"layer_norm: expected None, 'haste' or 'torchaudio', got {layer_norm!r}")
        if peephole and layer_norm is not None:
            raise ValueError(
                "peephole: expected False with layer_norm: neither haste's nor torchaudio's form has peepholes, and "
                "where they would enter is not defined"
            )
        extra: dict[str, tuple[int, ...]] = {"weight_peephole": (3, hidden_size)} if peephole else {}
        for stem in () if layer_norm is None else LAYER_NORMS[layer_norm]:
            extra[stem] = (hidden_size,) if stem.endswith("_c") else (4 * hidden_size,)
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
            recurrent_dropout,
            grad_clip,
            recompute,
            extra,
        )
        rates = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
        if len(rates) != 2:
            raise ValueError(f"zoneout: expected a number or two, on h and on c, got {len(rates)}")
        self.zoneout = (checked_rate("zoneout", rates[0]), checked_rate("zoneout", rates[1]))
        self.peephole = peephole
        self.layer_norm = layer_norm
        self.cell_clip = checked_limit("cell_clip", cell_clip)

    def extra_repr(self) -> str:
        zoneout = self.zoneout[0] if self.zoneout[0] == self.zoneout[1] else self.zoneout
        shown = {"zoneout": zoneout or None, "peephole": self.peephole or None, "layer_norm": self.layer_norm}
        shown |= {"cell_clip": self.cell_clip}
        parts = [f", {name}={value!r}" for name, value in shown.items() if value is not None]
        return super().extra_repr() + "".join(parts)

    if TYPE_CHECKING:
        # nn.Module.__call__ is typed to return Any; the overloads are worth more to the caller.
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: Pair | None = None,
            *,
            lengths: Tensor | None = None,
            reset: Tensor | None = None,
            reset_state: Pair | None = None,
            return_states: Literal[False] = False,
        ) -> tuple[Tensor, Pair]: ...

        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: Pair | None = None,
            *,
            lengths: None = None,
            reset: Tensor | None = None,
            reset_state: Pair | None = None,
            return_states: Literal[False] = False,
        ) -> tuple[PackedSequence, Pair]: ...

        @overload
        def __call__(
            self,
            input: Tensor,
            hx: Pair | None = None,
            *,
            lengths: Tensor | None = None,
            reset: Tensor | None = None,
            reset_state: Pair | None = None,
            return_states: Literal[True],
        ) -> tuple[Tensor, Pair, States]: ...

        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: Pair | None = None,
            *,
            lengths: None = None,
            reset: Tensor | None = None,
            reset_state: Pair | None = None,
            return_states: Literal[True],
        ) -> tuple[PackedSequence, Pair, States]: ...

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
