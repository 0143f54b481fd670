"""The LSTM, as the specification: a plain loop over time that reads as the formulas.

    i, f, o = sigmoid(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh)    (a slice of 4H each)
    g       = tanh(the same)                                    (gate order i, f, g, o, as PyTorch's)
    c_t     = f * c_{t-1} + i * g
    h_t     = o * tanh(c_t), or w_hr (o * tanh(c_t)) with a projection

after Hochreiter & Schmidhuber 1997 with the forget gate of Gers, Schmidhuber & Cummins 2000, and the projection of Sak,
Senior & Beaufays 2014. The options are those of :class:`Options`, each with its formula and source. The backward is the
derivative that autograd takes of this loop (but for ``grad_clip``), so it can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm as normalised
from torch.nn.functional import linear, pad

from fastseq.reference.common import (
    accumulate_dtype,
    clip_gradient,
    flag_masks,
    gradients,
    per_step,
    reset_row,
    rounded,
    time_masks,
    without_autocast,
    zoned_out,
)

EPS = 1e-5  # of both layer normalisations


@dataclass(frozen=True)
class Options:
    """What may be added to the plain LSTM; each field by default absent.

    Attributes:
        h_reset: ``[1 or T, B, P]``: the state that a step takes which is cut off from the one before (Kapturowski et
            al. 2019, stored states); its own row of T, or the one row. Zeros if None.
        c_reset: the same of the cell, ``[1 or T, B, H]``.
        h_mask: ``[B, P]``: ``h_{t-1} * h_mask`` enters the recurrent product, the same mask at every step (Gal &
            Ghahramani 2016, "variational" dropout).
        zoneout_h: ``bool [T, B, P]``, or a rate: ``h_t = h_{t-1}`` where true, or with the rate d
            ``h_t = d h_{t-1} + (1 - d) h_t`` (Krueger et al. 2017, eq. 5; the expectation is for evaluation). The
            fresh ``h_t`` is made from the fresh cell state.
        zoneout_c: the same of the cell, ``[T, B, H]``.
        peephole: ``[3, H]``, rows p_i, p_f, p_o: ``p_i c_{t-1}`` is added to i before the sigmoid, ``p_f c_{t-1}`` to
            f, ``p_o c_t`` to o (Gers & Schmidhuber 2000).
        weight_ln_ih, weight_ln_hh, weight_ln_gates, bias_ln_gates: ``[4H]``, with
        weight_ln_c, bias_ln_c: ``[H]``: layer normalisation over all 4H numbers of the gates, or the H of the cell,
            with the biased variance and :data:`EPS` (Ba et al. 2016), in two forms. haste's has the first two:
            ``LN(w_ih x_t) * weight_ln_ih + LN(w_hh h_{t-1}) * weight_ln_hh + b_ih + b_hh`` for the gates, and
            ``h_t = o * tanh(LN(c_t) * weight_ln_c + bias_ln_c)`` while the raw ``c_t`` is carried (LMNT's haste,
            ``LayerNormLSTM``). torchaudio's has the other two:
            ``LN(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh) * weight_ln_gates + bias_ln_gates`` for the gates, and
            ``c_t = LN(f c_{t-1} + i g) * weight_ln_c + bias_ln_c`` is what is carried (``_CustomLSTM`` of its RNN-T).
        cell_clip: ``f c_{t-1} + i g`` is clipped to ±cell_clip before anything reads it (Sak et al. 2014, and
            ``cell_clip`` of TensorFlow's LSTMCell).
        grad_clip: the total gradient dL/dh_t, from the output and from the steps after, is clipped elementwise to
            ±grad_clip at every step of backpropagation through time (after Graves 2013, section 2.1, who clips before
            the activations). The result is the gradient of nothing.
    """

    h_reset: Tensor | None = None
    c_reset: Tensor | None = None
    h_mask: Tensor | None = None
    zoneout_h: Tensor | float | None = None
    zoneout_c: Tensor | float | None = None
    peephole: Tensor | None = None
    weight_ln_ih: Tensor | None = None
    weight_ln_hh: Tensor | None = None
    weight_ln_gates: Tensor | None = None
    bias_ln_gates: Tensor | None = None
    weight_ln_c: Tensor | None = None
    bias_ln_c: Tensor | None = None
    cell_clip: float | None = None
    grad_clip: float | None = None

    @property
    def haste(self) -> bool:
        """Whether layers are normalised as haste does."""
        return self.weight_ln_ih is not None

    @property
    def torchaudio(self) -> bool:
        """Whether layers are normalised as torchaudio does."""
        return self.weight_ln_gates is not None

    def to(self, dtype: torch.dtype) -> Options:
        """The same with floating tensors in ``dtype``."""
        changed: dict[str, Any] = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, **changed)


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | float | None = None,
    zoneout_c: Tensor | float | None = None,
    weight_ln_ih: Tensor | None = None,
    weight_ln_hh: Tensor | None = None,
    weight_ln_gates: Tensor | None = None,
    bias_ln_gates: Tensor | None = None,
    weight_ln_c: Tensor | None = None,
    bias_ln_c: Tensor | None = None,
    cell_clip: float | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
    return_states: bool = False,
) -> tuple[Tensor, ...]:
    """One LSTM layer in one direction over a whole sequence; arguments and results as :func:`fastseq.functional.lstm`.

    Any device and floating dtype. Half types are computed in float32; only ``h`` is rounded, at every step before it is
    used again, and with it ``y``. The cell state is carried in float32. ``recompute`` changes nothing here: it is about
    memory.
    """
    cut, padding = time_masks(lengths, reset, x.shape[0], reverse, x.device)
    h_reset, c_reset = (None, None) if reset_state is None else map(per_step, reset_state)
    options = Options(
        h_reset,
        c_reset,
        h_mask,
        zoneout_h,
        zoneout_c,
        peephole,
        weight_ln_ih,
        weight_ln_hh,
        weight_ln_gates,
        bias_ln_gates,
        weight_ln_c,
        bias_ln_c,
        cell_clip,
        grad_clip,
    )
    y, h_n, c_n, c, gates = _recurrence(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, cut, padding, options)
    if not return_states:
        return y, h_n, c_n
    if padding is not None:
        c, gates = (torch.where(padding[..., None], 0.0, value) for value in (c, gates))
    return y, h_n, c_n, c.to(x.dtype), gates.to(x.dtype)


def _recurrence(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [B, P]
    c0: Tensor,  # [B, H]
    w_ih: Tensor,  # [4H, I]
    w_hh: Tensor,  # [4H, P]
    b_ih: Tensor | None,  # [4H]
    b_hh: Tensor | None,  # [4H]
    w_hr: Tensor | None,  # [P, H]
    reverse: bool,
    cut: Tensor | None,  # [T, B]
    padding: Tensor | None,  # [T, B]
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``y, h_n, c_n``, and of every step the cell state ``[T, B, H]`` and the gates ``[T, B, 4H]``."""
    dtype = x.dtype
    wide = accumulate_dtype(dtype)
    with without_autocast(x):
        x, h, c, w_ih, w_hh = (v.to(wide) for v in (x, h0, c0, w_ih, w_hh))
        b_ih, b_hh, w_hr = (None if v is None else v.to(wide) for v in (b_ih, b_hh, w_hr))
        extra = options.to(wide)
        steps = x.shape[0]
        ys, cs, gates = [x] * steps, [x] * steps, [x] * steps  # every place is filled below, in either order
        for t in reversed(range(steps)) if reverse else range(steps):
            if cut is not None:
                h = torch.where(cut[t, :, None], reset_row(extra.h_reset, t), h)
                c = torch.where(cut[t, :, None], reset_row(extra.c_reset, t), c)
            z = _before_activation(x[t], h, w_ih, w_hh, b_ih, b_hh, extra)
            h_t, c_t, gates[t] = _cell(z, c, w_hr, extra)
            h_t, c_t = zoned_out(h, h_t, extra.zoneout_h, t), zoned_out(c, c_t, extra.zoneout_c, t)
            h_t = rounded(h_t, dtype)
            if extra.grad_clip is not None:
                h_t = clip_gradient(h_t, extra.grad_clip)
            if padding is None:
                h, c, y_t = h_t, c_t, h_t
            else:
                h = torch.where(padding[t, :, None], h, h_t)
                c = torch.where(padding[t, :, None], c, c_t)
                y_t = torch.where(padding[t, :, None], 0.0, h_t)
            ys[t], cs[t] = y_t, c
        return torch.stack(ys).to(dtype), h.to(dtype), c.to(dtype), torch.stack(cs), torch.stack(gates)


def _before_activation(
    x_t: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    extra: Options,
) -> Tensor:
    """The four gates of a step before their activations and without peepholes, ``[B, 4H]``."""
    if extra.h_mask is not None:
        h = h * extra.h_mask
    size = w_hh.shape[:1]
    if extra.haste:
        z = normalised(linear(x_t, w_ih), size, extra.weight_ln_ih, None, EPS)
        z = z + normalised(linear(h, w_hh), size, extra.weight_ln_hh, None, EPS)
        for bias in (b_ih, b_hh):
            z = z if bias is None else z + bias
        return z
    z = linear(x_t, w_ih, b_ih) + linear(h, w_hh, b_hh)
    if extra.torchaudio:
        z = normalised(z, size, extra.weight_ln_gates, extra.bias_ln_gates, EPS)
    return z


def _cell(z: Tensor, c: Tensor, w_hr: Tensor | None, extra: Options) -> tuple[Tensor, Tensor, Tensor]:
    """``h_t, c_t`` and the gates after activation, from the sum ``z`` and the cell state before."""
    i, f, g, o = z.chunk(4, dim=-1)
    if extra.peephole is not None:
        i, f = i + extra.peephole[0] * c, f + extra.peephole[1] * c
    i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
    c_t = f * c + i * g
    if extra.cell_clip is not None:
        c_t = c_t.clamp(-extra.cell_clip, extra.cell_clip)
    if extra.torchaudio:
        c_t = normalised(c_t, c_t.shape[-1:], extra.weight_ln_c, extra.bias_ln_c, EPS)
    if extra.peephole is not None:
        o = o + extra.peephole[2] * c_t
    o = o.sigmoid()
    seen = c_t
    if extra.haste:
        seen = normalised(c_t, c_t.shape[-1:], extra.weight_ln_c, extra.bias_ln_c, EPS)
    h_t = o * seen.tanh()
    if w_hr is not None:
        h_t = linear(h_t, w_hr)
    return h_t, c_t, torch.cat([i, f, g, o], dim=-1)


def lstm_options_fwd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel ``fastseq::lstm_options_fwd``: as :func:`lstm_fwd`, with everything that :class:`Options` names.

    ``rest`` are the tensors of :class:`Options` in their order (the masks of zoneout only), ``reverse``, the two rates
    of zoneout, ``cell_clip``, ``grad_clip``, ``recompute`` and ``save``. With ``recompute`` the tape has no gates.
    """
    *values, recompute, save = rest
    reverse, options = _options(values)
    cut, padding = flag_masks(flags)
    y, h_n, c_n, c, gates = _recurrence(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, cut, padding, options)
    h_n, c_n = h_n.contiguous(), c_n.contiguous()
    if not save:
        return y, h_n, c_n, c.new_empty(0), c.new_empty(0)
    spare = -c.shape[-1] % 16
    c = pad(c, (0, spare))
    if recompute:
        return y, h_n, c_n, c, c.new_empty(0)
    gates = pad(gates.unflatten(-1, (4, -1)), (0, spare)).flatten(-2)  # each gate padded to Hp columns
    return y, h_n, c_n, c, pad(gates, (0, 16))


def lstm_options_bwd(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_c: Tensor | None,
    grad_gates: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
    *rest: Any,
    differentiable: bool = False,
) -> tuple[Tensor, ...]:
    """The kernel ``fastseq::lstm_options_bwd``: the gradients of the inputs, by autograd, without the tape.

    ``rest`` are the tensors of :class:`Options`, ``y, c, gates``, the settings of :func:`lstm_options_fwd`, and
    ``needs``, a mask: 1 asks for ``dx``, 2 for ``dh0`` and ``dc0``, 4 for the weights, 8 for the reset states, 16 for
    ``h_mask``. What is not asked for or does not exist comes back with shape ``[0]``.
    """
    tensors, values, needs = rest[:_TENSORS], rest[_TENSORS + 3 : -2], rest[-1]
    reverse = values[0]
    cut, padding = flag_masks(flags)
    hidden = c0.shape[-1]
    bias = b_hh if b_ih is None else b_ih  # both have the same gradient
    # Of the tensors of Options, zoneout's masks have no gradient.
    h_reset, c_reset, h_mask, zoneout_h, zoneout_c, *weights = tensors

    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        x, h0, c0, w_ih, w_hh, bias, w_hr, h_reset, c_reset, h_mask, *weights = inputs
        _, options = _options((h_reset, c_reset, h_mask, zoneout_h, zoneout_c, *weights, *values))
        other = None if b_ih is None else b_hh
        return _recurrence(x, h0, c0, w_ih, w_hh, bias, other, w_hr, reverse, cut, padding, options)

    state, of_weights, of_reset, of_mask = needs & 2, needs & 4, needs & 8, needs & 16
    # The gradients that arrive at the tape, without the columns beyond the hidden size.
    grad_c = None if grad_c is None else grad_c[..., :hidden]
    if grad_gates is not None:
        grad_gates = grad_gates[..., :-16].unflatten(-1, (4, -1))[..., :hidden].flatten(-2)
    return gradients(
        forward,
        (x, h0, c0, w_ih, w_hh, bias, w_hr, h_reset, c_reset, h_mask, *weights),
        (needs & 1, state, state, *(of_weights,) * 4, of_reset, of_reset, of_mask, *(of_weights,) * len(weights)),
        (grad_y, grad_h_n, grad_c_n, grad_c, grad_gates),
        differentiable=differentiable,
    )


_TENSORS = 12  # tensors of Options


def _options(values: Sequence[Any]) -> tuple[bool, Options]:
    """``reverse`` and the options, from the tensors of :class:`Options`, ``reverse`` and the other settings."""
    reverse, rate_h, rate_c, cell_clip, grad_clip = values[_TENSORS:]
    given: Any = (*values[:_TENSORS], cell_clip, grad_clip)
    options = Options(*given)
    if options.zoneout_h is None and rate_h > 0:
        options = replace(options, zoneout_h=rate_h)
    if options.zoneout_c is None and rate_c > 0:
        options = replace(options, zoneout_c=rate_c)
    return reverse, options


_NO_OPTIONS = (None,) * _TENSORS
_NO_SETTINGS = (0.0, 0.0, None, None, False)


def lstm_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel ``fastseq::lstm_fwd``: ``y, h_n, c_n``, and the tape ``c, gates`` (see :mod:`fastseq.ops.tape`).

    ``args`` are the inputs ``x`` to ``flags``, ``reverse`` and ``save``.
    """
    *inputs, reverse, save = args
    return lstm_options_fwd(*inputs, *_NO_OPTIONS, reverse, *_NO_SETTINGS, save)


def lstm_bwd(*args: Any, differentiable: bool = False) -> tuple[Tensor, ...]:
    """The kernel ``fastseq::lstm_bwd``: ``dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr``, by autograd, without the tape.

    ``args`` are the three gradients that arrive, the inputs ``x`` to ``flags``, the tape ``y, c, gates``, ``reverse``,
    and ``needs`` as :func:`lstm_options_bwd` has it.
    """
    *given, y, c, gates, reverse, needs = args
    given[3:3] = (None, None)
    results = lstm_options_bwd(
        *given, *_NO_OPTIONS, y, c, gates, reverse, *_NO_SETTINGS, needs, differentiable=differentiable
    )
    return results[:7]
