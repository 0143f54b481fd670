"""Launchers of the C++ Elman RNN kernels: one layer in one direction. Shapes as in :mod:`fastseq.ops.rnn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import (
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
from fastseq.ops.needs import NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.tape import accumulate_dtype, slopes_shape

ACTIVATIONS = {"tanh": 0, "relu": 1, "sigmoid": 2}


def _check(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    flags: Tensor | None,
    nonlinearity: str,
) -> tuple[int, int, int, int, int]:
    """The sizes (T, B, I, H, H), with every input found to have the size they say."""
    if nonlinearity not in ACTIVATIONS:
        raise ValueError(f"nonlinearity: expected one of {', '.join(ACTIVATIONS)}, got {nonlinearity!r}")
    steps, batch, inputs = x.shape
    hidden = h0.shape[-1]
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
    return steps, batch, inputs, hidden, hidden


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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h_n, slopes)``; the tape ``slopes`` is empty unless ``save``."""
    sizes = _check(x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity)
    steps, batch, _, hidden, _ = sizes
    y, h_n = new_output(x, (steps, batch, hidden)), h0.new_empty(h0.shape)
    shape = slopes_shape(steps, batch, hidden) if save else (0,)
    slopes = new_tape(x, shape, accumulate_dtype(x.dtype))
    if batch == 0:
        return y, h_n, slopes
    # Names, so that the dense copies outlive the call.
    x, h0, w_ih, w_hh = dense_rows(x), dense(h0), dense(w_ih), dense(w_hh)
    b_ih, b_hh, flags = dense(b_ih), dense(b_hh), dense(flags)
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
) -> tuple[Tensor, ...]:
    """``(dx, dh0, dw_ih, dw_hh, db)``, empty where ``needs`` does not ask; ``overwrite`` reuses ``slopes``."""
    sizes = _check(x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity)
    steps, batch, _, hidden, _ = sizes
    expect(
        (
            ("grad_y", grad_y, (steps, batch, hidden), x.dtype),
            ("grad_h_n", grad_h_n, (batch, hidden), x.dtype),
            ("y", y, (steps, batch, hidden), x.dtype),
            ("slopes", slopes, slopes_shape(steps, batch, hidden), accumulate_dtype(x.dtype)),
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
    dgates = slopes if overwrite else new_tape(x, slopes.shape, slopes.dtype)
    flags, grad_h_n = dense(flags), dense(grad_h_n)
    grad_y = None if grad_y is None else dense_rows(grad_y)
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
        torch.get_num_threads(),
    )
    return results


# The operation with options. The kernels serve lengths and reset only (fastseq.ops.dispatch.SERVED), so that a call
# which comes here uses none of the others, and their arguments can be left out.


def rnn_options_fwd(*args: Any) -> tuple[Tensor, ...]:
    """``rnn_fwd`` for a call of ``fastseq::rnn_options_fwd`` that uses no option but flags."""
    given: Any = (*args[:7], *args[9:11], args[-1])
    return rnn_fwd(*given)


def rnn_options_bwd(*args: Any, overwrite: bool = False) -> tuple[Tensor, ...]:
    """``rnn_bwd`` likewise; the gradients of the options are empty."""
    given: Any = (*args[:9], *args[11:15], args[-1])
    results = rnn_bwd(*given, overwrite=overwrite)
    return (*results, *(results[0].new_empty(0) for _ in range(2)))
