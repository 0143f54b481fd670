"""Launchers of the C++ Elman RNN kernels: one layer in one direction. Shapes as in :mod:`fastseq.ops.rnn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import (
    Sizes,
    address,
    dense,
    dense_rows,
    expect,
    new_gradients,
    new_output,
    new_tape,
    storage_of,
    time_strides,
)
from fastseq.cpu.options import Given, KernelOptions, per_step, reset_gradient
from fastseq.ops.needs import NEEDS_MASK, NEEDS_RESET, NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.tape import KEEP, accumulate_dtype, slopes_shape

ACTIVATIONS = {"tanh": 0, "relu": 1, "sigmoid": 2}


def _sizes(x: Tensor, h0: Tensor) -> Sizes:
    """(T, B, I, H, H)."""
    steps, batch, inputs = x.shape
    hidden = h0.shape[-1]
    return steps, batch, inputs, hidden, hidden


def _check(
    sizes: Sizes,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    flags: Tensor | None,
    nonlinearity: str,
) -> None:
    """Every input has the size that ``sizes`` say, and there is such a nonlinearity."""
    if nonlinearity not in ACTIVATIONS:
        raise ValueError(f"nonlinearity: expected one of {', '.join(ACTIVATIONS)}, got {nonlinearity!r}")
    steps, batch, inputs, hidden, _ = sizes
    dtype = x.dtype
    expect(
        (
            ("x", x, (steps, batch, inputs), dtype),
            ("h0", h0, (batch, hidden), dtype),
            ("w_ih", w_ih, (hidden, inputs), dtype),
            ("w_hh", w_hh, (hidden, hidden), dtype),
            ("b_ih", b_ih, (hidden,), dtype),
            ("b_hh", b_hh, (hidden,), dtype),
            ("flags", flags, (steps, batch), torch.uint8),
        )
    )


def rnn_fwd(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    flags: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    save: int,
    *,
    options: Given | None = None,
    checked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h_n, slopes)``; the tape ``slopes`` is empty unless ``save``.

    ``checked``: the inputs are as they should be.
    """
    sizes = _sizes(x, h0)
    if not checked:
        _check(sizes, x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity)
    steps, batch, _, hidden, _ = sizes
    y, h_n = new_output(x, (steps, batch, hidden)), h0.new_empty(h0.shape)
    shape = slopes_shape(steps, batch, hidden) if save else (0,)
    slopes = new_tape(x, shape, accumulate_dtype(x.dtype))
    if batch == 0:
        return y, h_n, slopes
    # Names, so that the dense copies outlive the call.
    x, h0, w_ih, w_hh = dense_rows(x), dense(h0), dense(w_ih), dense(w_hh)
    b_ih, b_hh, flags = dense(b_ih), dense(b_hh), dense(flags)
    extra = None if options is None else KernelOptions(options)
    _cpu.rnn_forward(
        storage_of(x),
        ACTIVATIONS[nonlinearity],
        sizes,
        address(x),
        *time_strides(x),
        address(h0),
        0,
        address(w_ih),
        address(w_hh),
        address(b_ih),
        address(b_hh),
        0,
        address(flags),
        reverse,
        address(y),
        address(h_n),
        0,
        0,
        address(slopes),
        None if extra is None else extra.handle,
        options is None and save != KEEP,
        torch.get_num_threads(),
    )
    return y, h_n, slopes


def rnn_bwd(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    flags: Tensor | None,
    y: Tensor,
    slopes: Tensor,
    nonlinearity: str,
    reverse: bool,
    needs: int,
    *,
    overwrite: bool = False,
    options: Given | None = None,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """``(dx, dh0, dw_ih, dw_hh, db)``, empty where ``needs`` does not ask; ``overwrite`` reuses ``slopes``.

    ``options`` name the memory of their gradients too.
    """
    sizes = _sizes(x, h0)
    _check(sizes, x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity)
    steps, batch, _, hidden, _ = sizes
    expect(
        (
            ("grad_y", grad_y, (steps, batch, hidden), x.dtype),
            ("grad_h_n", grad_h_n, (batch, hidden), x.dtype),
            ("y", y, (steps, batch, hidden), x.dtype),
            ("slopes", slopes, (0,) if recompute else slopes_shape(steps, batch, hidden), accumulate_dtype(x.dtype)),
        )
    )
    results = new_gradients(
        (
            (needs & NEEDS_X, x),
            (needs & NEEDS_STATE, h0),
            (needs & NEEDS_WEIGHTS, w_ih),
            (needs & NEEDS_WEIGHTS, w_hh),
            (needs & NEEDS_WEIGHTS, b_hh if b_ih is None else b_ih),
        )
    )
    if batch == 0:
        return tuple(result.zero_() for result in results)
    dx, dh0, dw_ih, dw_hh, db = results
    # Names, so that the dense copies outlive the call.
    x, h0, w_ih, w_hh, y, slopes = dense_rows(x), dense(h0), dense(w_ih), dense(w_hh), dense(y), dense(slopes)
    dgates = slopes if overwrite or recompute else new_tape(x, slopes.shape, slopes.dtype)
    flags, grad_h_n = dense(flags), dense(grad_h_n)
    grad_y = None if grad_y is None else dense_rows(grad_y)
    extra = None if options is None else KernelOptions(options)
    _cpu.rnn_backward(
        storage_of(x),
        ACTIVATIONS[nonlinearity],
        sizes,
        address(grad_y),
        *time_strides(grad_y),
        address(grad_h_n),
        0,
        address(x),
        *time_strides(x),
        address(h0),
        0,
        address(w_ih),
        address(w_hh),
        0,
        address(flags),
        reverse,
        address(y),
        0,
        address(slopes),
        address(dgates),
        address(dx),
        address(dh0),
        0,
        address(dw_ih),
        address(dw_hh),
        address(db),
        0,
        None if extra is None else extra.handle,
        torch.get_num_threads(),
    )
    return results


# The operation with options: its arguments are those above, the tensors of fastseq.reference.rnn.Options, and the
# settings.

_PLAIN = 7


def _options(x: Tensor, h0: Tensor, h_reset: Tensor | None, h_mask: Tensor | None) -> Given:
    """What the forward is asked for, with every tensor found to have the size that the kernel assumes."""
    steps, batch, hidden = x.shape[0], *h0.shape
    rows = steps if per_step(h_reset) else 1
    expect((("h_reset", h_reset, (rows, batch, hidden), x.dtype), ("h_mask", h_mask, (batch, hidden), x.dtype)))
    return {"h_reset": h_reset, "h_reset_per_step": per_step(h_reset), "h_mask": h_mask}


def rnn_options_fwd(*args: Any) -> tuple[Tensor, ...]:
    """``rnn_fwd`` for a call of ``fastseq::rnn_options_fwd``."""
    inputs, (h_reset, h_mask) = args[:_PLAIN], args[_PLAIN : _PLAIN + 2]
    nonlinearity, reverse, _grad_clip, recompute, save = args[_PLAIN + 2 :]
    given: Any = (*inputs, nonlinearity, reverse, save and not recompute)
    return rnn_fwd(*given, options=_options(inputs[0], inputs[1], h_reset, h_mask))


def rnn_options_bwd(*args: Any, overwrite: bool = False) -> tuple[Tensor, ...]:
    """``rnn_bwd`` likewise, with the gradients of the options behind the others."""
    arriving, inputs, rest = args[:2], args[2 : 2 + _PLAIN], args[2 + _PLAIN :]
    h_reset, h_mask, y, slopes, nonlinearity, reverse, grad_clip, recompute, needs = rest
    x, h0, _, _, b_ih, b_hh, _ = inputs
    options = {**_options(x, h0, h_reset, h_mask), "grad_clip": grad_clip}
    if recompute:
        options |= {"recompute": True, "b_ih": b_ih, "b_hh": b_hh}
    dh_reset = reset_gradient(needs & NEEDS_RESET, h_reset, x)
    (dh_mask,) = new_gradients(((needs & NEEDS_MASK, h_mask),), x)
    options |= {"dh_reset": dh_reset, "dh_mask": dh_mask}
    given: Any = (*arriving, *inputs, y, slopes, nonlinearity, reverse, needs)
    results = rnn_bwd(*given, overwrite=overwrite, options=options, recompute=recompute)
    if x.shape[1] == 0:
        dh_reset, dh_mask = dh_reset.zero_(), dh_mask.zero_()
    return (*results, dh_reset, dh_mask)
