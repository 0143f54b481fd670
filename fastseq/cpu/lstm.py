"""Launchers of the C++ LSTM kernels: one layer in one direction. Shapes as in :mod:`fastseq.ops.lstm`."""

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
from fastseq.ops.tape import accumulate_dtype, tape_shapes


def _check(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """The sizes (T, B, I, H, P), with every input found to have the size they say."""
    steps, batch, inputs = x.shape
    hidden, outputs = w_hh.shape[0] // 4, h0.shape[-1]
    dtype = x.dtype
    expect(
        (
            ("x", x, (steps, batch, inputs), dtype),
            ("h0", h0, (batch, outputs), dtype),
            ("c0", c0, (batch, hidden), dtype),
            ("w_ih", w_ih, (4 * hidden, inputs), dtype),
            ("w_hh", w_hh, (4 * hidden, outputs), dtype),
            ("b_ih", b_ih, (4 * hidden,), dtype),
            ("b_hh", b_hh, (4 * hidden,), dtype),
            ("w_hr", w_hr, (outputs, hidden), dtype),
            ("flags", flags, (steps, batch), torch.uint8),
        )
    )
    return steps, batch, inputs, hidden, outputs


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
    """``(y, h_n, c_n, c, gates)``; the tape ``c``, ``gates`` is empty unless ``save``."""
    sizes = _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags)
    steps, batch, _, hidden, outputs = sizes
    c_shape, gates_shape = tape_shapes(steps, batch, hidden) if save else ((0,), (0,))
    wide = accumulate_dtype(x.dtype)
    y, h_n, c_n = new_output(x, (steps, batch, outputs)), h0.new_empty(h0.shape), c0.new_empty(c0.shape)
    c, gates = new_tape(x, c_shape, wide), new_tape(x, gates_shape, wide)
    if batch == 0:
        return y, h_n, c_n, c, gates
    # Names, so that the dense copies outlive the call.
    x, h0, c0, w_ih, w_hh = dense_rows(x), dense(h0), dense(c0), dense(w_ih), dense(w_hh)
    b_ih, b_hh, w_hr, flags = dense(b_ih), dense(b_hh), dense(w_hr), dense(flags)
    _cpu.lstm_forward(
        storage_of(x),
        0,
        sizes,
        address(x),
        *time_strides(x),
        address(h0),
        address(c0),
        address(w_ih),
        address(w_hh),
        address(b_ih),
        address(b_hh),
        address(w_hr),
        address(flags),
        reverse,
        address(y),
        address(h_n),
        address(c_n),
        address(c),
        address(gates),
        torch.get_num_threads(),
    )
    return y, h_n, c_n, c, gates


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
    overwrite: bool = False,
) -> tuple[Tensor, ...]:
    """``(dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr)``, empty where not needed; ``overwrite`` reuses ``gates``."""
    sizes = _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags)
    steps, batch, _, hidden, outputs = sizes
    c_shape, gates_shape = tape_shapes(steps, batch, hidden)
    wide = accumulate_dtype(x.dtype)
    expect(
        (
            ("grad_y", grad_y, (steps, batch, outputs), x.dtype),
            ("grad_h_n", grad_h_n, (batch, outputs), x.dtype),
            ("grad_c_n", grad_c_n, (batch, hidden), x.dtype),
            ("y", y, (steps, batch, outputs), x.dtype),
            ("c", c, c_shape, wide),
            ("gates", gates, gates_shape, wide),
        )
    )
    wanted = (
        (needs & NEEDS_X, x),
        (needs & NEEDS_STATE, h0),
        (needs & NEEDS_STATE, c0),
        (needs & NEEDS_WEIGHTS, w_ih),
        (needs & NEEDS_WEIGHTS, w_hh),
        (needs & NEEDS_WEIGHTS, b_hh if b_ih is None else b_ih),
        (needs & NEEDS_WEIGHTS, w_hr),
    )
    results = new_gradients(wanted)
    if batch == 0:
        return tuple(result.zero_() for result in results)
    dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr = results
    # Names, so that the dense copies outlive the call.
    x, h0, c0, w_ih, w_hh = dense_rows(x), dense(h0), dense(c0), dense(w_ih), dense(w_hh)
    w_hr, flags, y, c, gates = dense(w_hr), dense(flags), dense(y), dense(c), dense(gates)
    dgates = gates if overwrite else new_tape(x, gates_shape, wide)
    grad_h_n, grad_c_n = dense(grad_h_n), dense(grad_c_n)
    grad_y = None if grad_y is None else dense_rows(grad_y)
    _cpu.lstm_backward(
        storage_of(x),
        0,
        sizes,
        address(grad_y),
        *time_strides(grad_y),
        address(grad_h_n),
        address(grad_c_n),
        address(x),
        *time_strides(x),
        address(h0),
        address(c0),
        address(w_ih),
        address(w_hh),
        address(w_hr),
        address(flags),
        reverse,
        address(y),
        address(c),
        address(gates),
        address(dgates),
        address(dx),
        address(dh0),
        address(dc0),
        address(dw_ih),
        address(dw_hh),
        address(db),
        address(dw_hr),
        torch.get_num_threads(),
    )
    return results


# The operation with options. The kernels serve lengths and reset only (fastseq.ops.dispatch.SERVED), so that a call
# which comes here uses none of the others, and their arguments can be left out.


def lstm_options_fwd(*args: Any) -> tuple[Tensor, ...]:
    """``lstm_fwd`` for a call of ``fastseq::lstm_options_fwd`` that uses no option but flags."""
    given: Any = (*args[:9], args[21], args[-1])
    return lstm_fwd(*given)


def lstm_options_bwd(*args: Any, overwrite: bool = False) -> tuple[Tensor, ...]:
    """``lstm_bwd`` likewise; the gradients of the options are empty."""
    given: Any = (*args[:3], *args[5:14], *args[26:30], args[-1])
    results = lstm_bwd(*given, overwrite=overwrite)
    return (*results, *(results[0].new_empty(0) for _ in range(10)))
