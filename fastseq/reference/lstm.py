"""The LSTM, as the specification: a plain loop over time that reads as the formulas.

    i, f, o = sigmoid(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh)    (a slice of 4H each)
    g       = tanh(the same)                                    (gate order i, f, g, o, as PyTorch's)
    c_t     = f * c_{t-1} + i * g
    h_t     = o * tanh(c_t), or w_hr (o * tanh(c_t)) with a projection

after Hochreiter & Schmidhuber 1997 with the forget gate of Gers, Schmidhuber & Cummins 2000, and the projection of Sak,
Senior & Beaufays 2014. The backward is the derivative that autograd takes of this loop, so it can be differentiated
again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fastseq.reference.common import accumulate_dtype, flag_masks, gradients, rounded, time_masks, without_autocast


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
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction over a whole sequence; arguments and results as :func:`fastseq.functional.lstm`.

    Any device and floating dtype. Half types are computed in float32; only ``h`` is rounded, at every step before it is
    used again, and with it ``y``. The cell state is carried in float32.
    """
    cut, padding = time_masks(lengths, reset, x.shape[0], reverse, x.device)
    y, h_n, c_n, _, _ = _recurrence(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, cut, padding)
    return y, h_n, c_n


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``y, h_n, c_n``, and of every step the cell state ``[T, B, H]`` and the gates ``[T, B, 4H]``."""
    dtype = x.dtype
    wide = accumulate_dtype(dtype)
    with without_autocast(x):
        x, h, c, w_ih, w_hh = (v.to(wide) for v in (x, h0, c0, w_ih, w_hh))
        b_ih, b_hh, w_hr = (None if v is None else v.to(wide) for v in (b_ih, b_hh, w_hr))
        steps = x.shape[0]
        ys, cs, gates = [x] * steps, [x] * steps, [x] * steps  # every place is filled below, in either order
        for t in reversed(range(steps)) if reverse else range(steps):
            if cut is not None:
                h = torch.where(cut[t, :, None], 0.0, h)
                c = torch.where(cut[t, :, None], 0.0, c)
            z = linear(x[t], w_ih, b_ih) + linear(h, w_hh, b_hh)  # [B, 4H]
            i, f, g, o = z.chunk(4, dim=-1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c_t = f * c + i * g
            h_t = o * c_t.tanh()
            if w_hr is not None:
                h_t = linear(h_t, w_hr)
            h_t = rounded(h_t, dtype)
            if padding is None:
                h, c, y_t = h_t, c_t, h_t
            else:
                h = torch.where(padding[t, :, None], h, h_t)
                c = torch.where(padding[t, :, None], c, c_t)
                y_t = torch.where(padding[t, :, None], 0.0, h_t)
            ys[t], cs[t], gates[t] = y_t, c, torch.cat([i, f, g, o], dim=-1)
        return torch.stack(ys).to(dtype), h.to(dtype), c.to(dtype), torch.stack(cs), torch.stack(gates)


def lstm_fwd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel ``fastseq::lstm_fwd``: ``y, h_n, c_n``, and the tape ``c, gates`` (see :mod:`fastseq.ops.tape`)."""
    cut, padding = flag_masks(flags)
    y, h_n, c_n, c, gates = _recurrence(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, cut, padding)
    h_n, c_n = h_n.contiguous(), c_n.contiguous()
    if not save:
        return y, h_n, c_n, c.new_empty(0), c.new_empty(0)
    spare = -c.shape[-1] % 16
    gates = pad(gates.unflatten(-1, (4, -1)), (0, spare)).flatten(-2)  # each gate padded to Hp columns
    return y, h_n, c_n, pad(c, (0, spare)), pad(gates, (0, 16))


def lstm_bwd(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
    y: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: int,
    *,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel ``fastseq::lstm_bwd``: ``dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr``, by autograd, without the tape.

    ``needs`` is a mask: 1 asks for ``dx``, 2 for ``dh0`` and ``dc0``, 4 for the weights. What is not asked for or does
    not exist comes back with shape ``[0]``.
    """
    cut, padding = flag_masks(flags)

    def forward(
        x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None, w_hr: Tensor | None
    ) -> tuple[Tensor, ...]:
        other = None if b_ih is None else b_hh
        return _recurrence(x, h0, c0, w_ih, w_hh, bias, other, w_hr, reverse, cut, padding)

    bias = b_hh if b_ih is None else b_ih  # both have the same gradient
    state, weights = needs & 2, needs & 4
    dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr = gradients(
        forward,
        (x, h0, c0, w_ih, w_hh, bias, w_hr),
        (needs & 1, state, state, weights, weights, weights, weights),
        (grad_y, grad_h_n, grad_c_n),
        differentiable=differentiable,
    )
    return dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr
