"""The Elman network, as the specification: a plain loop over time that reads as the formula.

    h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh)      with f in tanh, relu, logistic (Elman 1990)

The backward is the derivative that autograd takes of this loop (backpropagation through time, Werbos 1990).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
)

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}
# f' as a function of f
_SLOPES = {"tanh": lambda f: 1 - f * f, "relu": lambda f: (f > 0).to(f.dtype), "sigmoid": lambda f: f * (1 - f)}


@dataclass(frozen=True)
class Options:
    """What may be added to the plain Elman network; each field by default absent.

    Attributes:
        h_reset, h_mask, grad_clip: as of :class:`fastseq.reference.lstm.Options`, with P = H.
    """

    h_reset: Tensor | None = None
    h_mask: Tensor | None = None
    grad_clip: float | None = None


def rnn(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_mask: Tensor | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """One Elman layer in one direction over a whole sequence; arguments and results as :func:`fastseq.functional.rnn`.

    Any device and floating dtype. Half types are computed in float32; only ``h`` is rounded, at every step before it is
    used again, and with it ``y``. ``recompute`` changes nothing here: it is about memory.
    """
    cut, padding = time_masks(lengths, reset, x.shape[0], reverse, x.device)
    options = Options(None if reset_state is None else per_step(reset_state), h_mask, grad_clip)
    return _recurrence(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, cut, padding, options)[:2]


def _recurrence(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [B, H]
    w_ih: Tensor,  # [H, I]
    w_hh: Tensor,  # [H, H]
    b_ih: Tensor | None,  # [H]
    b_hh: Tensor | None,  # [H]
    nonlinearity: str,
    reverse: bool,
    cut: Tensor | None,  # [T, B]
    padding: Tensor | None,  # [T, B]
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y, h_n``, and of every step the value of the nonlinearity before rounding, ``[T, B, H]``."""
    f = NONLINEARITIES[nonlinearity]
    dtype = x.dtype
    wide = accumulate_dtype(dtype)
    with without_autocast(x):
        x, h, w_ih, w_hh = (v.to(wide) for v in (x, h0, w_ih, w_hh))
        b_ih, b_hh, h_reset, h_mask = (
            None if v is None else v.to(wide) for v in (b_ih, b_hh, options.h_reset, options.h_mask)
        )
        steps = x.shape[0]
        ys, values = [x] * steps, [x] * steps  # every place is filled below, in either order
        for t in reversed(range(steps)) if reverse else range(steps):
            if cut is not None:
                h = torch.where(cut[t, :, None], reset_row(h_reset, t), h)
            seen = h if h_mask is None else h * h_mask
            value = f(linear(x[t], w_ih, b_ih) + linear(seen, w_hh, b_hh))  # [B, H]
            h_t = rounded(value, dtype)
            if options.grad_clip is not None:
                h_t = clip_gradient(h_t, options.grad_clip)
            if padding is None:
                h = y_t = h_t
            else:
                h = torch.where(padding[t, :, None], h, h_t)
                y_t = torch.where(padding[t, :, None], 0.0, h_t)
            ys[t], values[t] = y_t, value
        return torch.stack(ys).to(dtype), h.to(dtype), torch.stack(values)


def rnn_options_fwd(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    flags: Tensor | None,
    h_reset: Tensor | None,
    h_mask: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    grad_clip: float | None,
    recompute: bool,
    save: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel ``fastseq::rnn_options_fwd``: as :func:`rnn_fwd`, with everything that :class:`Options` names.

    With ``recompute`` the tape is empty.
    """
    cut, padding = flag_masks(flags)
    options = Options(h_reset, h_mask, grad_clip)
    y, h_n, values = _recurrence(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, cut, padding, options)
    if recompute or not save:
        return y, h_n.contiguous(), values.new_empty(0)
    return y, h_n.contiguous(), pad(_SLOPES[nonlinearity](values), (0, -values.shape[-1] % 16 + 16))


def rnn_options_bwd(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    flags: Tensor | None,
    h_reset: Tensor | None,
    h_mask: Tensor | None,
    y: Tensor,
    slopes: Tensor,
    nonlinearity: str,
    reverse: bool,
    grad_clip: float | None,
    recompute: bool,
    needs: int,
    *,
    differentiable: bool = False,
) -> tuple[Tensor, ...]:
    """The kernel ``fastseq::rnn_options_bwd``: the gradients of the inputs, by autograd, without ``y`` and the tape.

    ``needs`` is a mask: 1 asks for ``dx``, 2 for ``dh0``, 4 for the weights, 8 for the reset state, 16 for ``h_mask``.
    What is not asked for or does not exist comes back with shape ``[0]``.
    """
    cut, padding = flag_masks(flags)

    def forward(
        x: Tensor,
        h0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        h_reset: Tensor | None,
        h_mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        other = None if b_ih is None else b_hh
        options = Options(h_reset, h_mask, grad_clip)
        return _recurrence(x, h0, w_ih, w_hh, bias, other, nonlinearity, reverse, cut, padding, options)[:2]

    bias = b_hh if b_ih is None else b_ih  # both have the same gradient
    weights = needs & 4
    return gradients(
        forward,
        (x, h0, w_ih, w_hh, bias, h_reset, h_mask),
        (needs & 1, needs & 2, weights, weights, weights, needs & 8, needs & 16),
        (grad_y, grad_h_n),
        differentiable=differentiable,
    )


def rnn_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel ``fastseq::rnn_fwd``: ``y, h_n``, and the tape ``slopes`` (see :mod:`fastseq.ops.tape`).

    ``args`` are the inputs ``x`` to ``flags``, ``nonlinearity``, ``reverse`` and ``save``.
    """
    *inputs, nonlinearity, reverse, save = args
    given: Any = (*inputs, None, None, nonlinearity, reverse, None, False, save)
    return rnn_options_fwd(*given)


def rnn_bwd(*args: Any, differentiable: bool = False) -> tuple[Tensor, ...]:
    """The kernel ``fastseq::rnn_bwd``: ``dx, dh0, dw_ih, dw_hh, db``, by autograd, without ``y`` and the tape.

    ``args`` are the two gradients that arrive, the inputs ``x`` to ``flags``, ``y``, ``slopes``, ``nonlinearity``,
    ``reverse``, and ``needs`` as :func:`rnn_options_bwd` has it.
    """
    *inputs, y, slopes, nonlinearity, reverse, needs = args
    given: Any = (*inputs, None, None, y, slopes, nonlinearity, reverse, None, False, needs)
    return rnn_options_bwd(*given, differentiable=differentiable)[:5]
