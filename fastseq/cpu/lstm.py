"""Launchers of the C++ LSTM kernels: one layer in one direction. Shapes as in :mod:`fastseq.ops.lstm`."""

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
from fastseq.ops.tape import KEEP, accumulate_dtype, tape_shapes


def _sizes(x: Tensor, h0: Tensor, w_hh: Tensor) -> Sizes:
    """(T, B, I, H, P)."""
    steps, batch, inputs = x.shape
    return steps, batch, inputs, w_hh.shape[0] // 4, h0.shape[-1]


def _check(
    sizes: Sizes,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
) -> None:
    """Every input has the size that ``sizes`` say."""
    steps, batch, inputs, hidden, outputs = sizes
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
    save: int,
    *,
    options: Given | None = None,
    recompute: bool = False,
    checked: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(y, h_n, c_n, c, gates)``; the tape ``c``, ``gates`` is empty unless ``save``, and without gates if they are to
    be made again. ``checked``: the inputs are as they should be."""
    sizes = _sizes(x, h0, w_hh)
    if not checked:
        _check(sizes, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags)
    steps, batch, _, hidden, outputs = sizes
    c_shape, gates_shape = tape_shapes(steps, batch, hidden) if save else ((0,), (0,))
    wide = accumulate_dtype(x.dtype)
    y, h_n, c_n = new_output(x, (steps, batch, outputs)), h0.new_empty(h0.shape), c0.new_empty(c0.shape)
    c, gates = new_tape(x, c_shape, wide), new_tape(x, (0,) if recompute else gates_shape, wide)
    if batch == 0:
        return y, h_n, c_n, c, gates
    # Names, so that the dense copies outlive the call.
    x, h0, c0, w_ih, w_hh = dense_rows(x), dense(h0), dense(c0), dense(w_ih), dense(w_hh)
    b_ih, b_hh, w_hr, flags = dense(b_ih), dense(b_hh), dense(w_hr), dense(flags)
    extra = None if options is None else KernelOptions(options)
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
        None if extra is None else extra.handle,
        options is None and save != KEEP,
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
    options: Given | None = None,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """``(dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr)``, empty where not needed; ``overwrite`` reuses ``gates``.

    ``options`` name the memory of their gradients too.
    """
    sizes = _sizes(x, h0, w_hh)
    _check(sizes, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags)
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
            ("gates", gates, (0,) if recompute else gates_shape, wide),
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
    dgates = gates if overwrite or recompute else new_tape(x, gates_shape, wide)
    grad_h_n, grad_c_n = dense(grad_h_n), dense(grad_c_n)
    grad_y = None if grad_y is None else dense_rows(grad_y)
    extra = None if options is None else KernelOptions(options)
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
        None if extra is None else extra.handle,
        torch.get_num_threads(),
    )
    return results


# The operation with options: its arguments are those above, the tensors of fastseq.reference.lstm.Options, and the
# settings.

_PLAIN, _TENSORS = 9, 12
_NORMS = "weight_ln_ih", "weight_ln_hh", "weight_ln_gates", "bias_ln_gates", "weight_ln_c", "bias_ln_c"


def _options(x: Tensor, h0: Tensor, c0: Tensor, tensors: Any, rates: Any, cell_clip: Any) -> Given:
    """What the forward is asked for, with every tensor found to have the size that the kernel assumes."""
    steps, batch = x.shape[:2]
    hidden, outputs = c0.shape[1], h0.shape[1]
    h_reset, c_reset, h_mask, zoneout_h, zoneout_c, peephole, *norm = tensors
    norms = dict(zip(_NORMS, norm, strict=True))

    def rows(state: Tensor | None) -> int:
        return steps if per_step(state) else 1

    expect(
        (
            ("h_reset", h_reset, (rows(h_reset), batch, outputs), x.dtype),
            ("c_reset", c_reset, (rows(c_reset), batch, hidden), x.dtype),
            ("h_mask", h_mask, (batch, outputs), x.dtype),
            ("zoneout_h", zoneout_h, (steps, batch, outputs), torch.bool),
            ("zoneout_c", zoneout_c, (steps, batch, hidden), torch.bool),
            ("peephole", peephole, (3, hidden), x.dtype),
            *((name, norms[name], (4 * hidden,), x.dtype) for name in _NORMS[:4]),
            *((name, norms[name], (hidden,), x.dtype) for name in _NORMS[4:]),
        )
    )
    return {
        "h_reset": h_reset,
        "c_reset": c_reset,
        "h_reset_per_step": per_step(h_reset),
        "c_reset_per_step": per_step(c_reset),
        "h_mask": h_mask,
        "zoneout_h": zoneout_h,
        "zoneout_c": zoneout_c,
        "zoneout_h_rate": rates[0],
        "zoneout_c_rate": rates[1],
        "peephole": peephole,
        "cell_clip": cell_clip,
        **norms,
    }


def lstm_options_fwd(*args: Any) -> tuple[Tensor, ...]:
    """``lstm_fwd`` for a call of ``fastseq::lstm_options_fwd``."""
    inputs, tensors = args[:_PLAIN], args[_PLAIN : _PLAIN + _TENSORS]
    reverse, rate_h, rate_c, cell_clip, _grad_clip, recompute, save = args[_PLAIN + _TENSORS :]
    x, h0, c0 = inputs[:3]
    options = _options(x, h0, c0, tensors, (rate_h, rate_c), cell_clip)
    given: Any = (*inputs, reverse, save)
    return lstm_fwd(*given, options=options, recompute=recompute)


def lstm_options_bwd(*args: Any, overwrite: bool = False) -> tuple[Tensor, ...]:
    """``lstm_bwd`` likewise, with the gradients of the options behind the others."""
    arriving, (grad_c, grad_gates), rest = args[:3], args[3:5], args[5:]
    inputs, tensors, rest = rest[:_PLAIN], rest[_PLAIN : _PLAIN + _TENSORS], rest[_PLAIN + _TENSORS :]
    tape, (reverse, rate_h, rate_c, cell_clip, grad_clip, recompute, needs) = rest[:3], rest[3:]
    x, h0, c0, _, w_hh, b_ih, b_hh = inputs[:7]
    h_reset, c_reset, h_mask, _, _, peephole, *norms = tensors
    options = dict(_options(x, h0, c0, tensors, (rate_h, rate_c), cell_clip))
    c_shape, gates_shape = tape_shapes(x.shape[0], x.shape[1], w_hh.shape[0] // 4)
    wide = accumulate_dtype(x.dtype)
    expect((("grad_c", grad_c, c_shape, wide), ("grad_gates", grad_gates, gates_shape, wide)))
    options |= {"grad_clip": grad_clip, "grad_c": grad_c, "grad_gates": grad_gates}
    if any(value is not None for value in norms):
        recompute, tape = True, (*tape[:2], x.new_empty(0, dtype=wide))  # its kernel never reads the gates
    if recompute:
        options |= {"recompute": True, "b_ih": b_ih, "b_hh": b_hh}
    dh_reset, dc_reset = (reset_gradient(needs & NEEDS_RESET, rows, x) for rows in (h_reset, c_reset))
    dh_mask, dpeephole = new_gradients(((needs & NEEDS_MASK, h_mask), (needs & NEEDS_WEIGHTS, peephole)), x)
    dnorms = new_gradients(((needs & NEEDS_WEIGHTS, value) for value in norms), x)
    options |= {"dh_reset": dh_reset, "dc_reset": dc_reset, "dh_mask": dh_mask, "dpeephole": dpeephole}
    options |= {f"d{name}": value for name, value in zip(_NORMS, dnorms, strict=True)}
    given: Any = (*arriving, *inputs, *tape, reverse, needs)
    results = lstm_bwd(*given, overwrite=overwrite, options=options, recompute=recompute)
    of_options = [dh_reset, dc_reset, dh_mask, dpeephole, *dnorms]
    if x.shape[1] == 0:
        of_options = [gradient.zero_() for gradient in of_options]
    return (*results, *of_options)
