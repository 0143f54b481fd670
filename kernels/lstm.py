"""LSTM in Triton: one layer in one direction, forward and BPTT, one launch for the whole sequence where possible.

The idea: the recurrence is bound by latency, so everything that does not depend on it is taken out of it. cuBLAS makes
the input projection of all steps before, straight into the tape, where the kernel overwrites it with the gates; cuBLAS
makes the gradients of weights and input after, from the gates' gradients of all steps. Between the two a program keeps
its recurrent weights and its cell state on chip and per step only fetches h (backward: the gates' gradients) of its
sequences. See :mod:`fastseq.kernels.plan` for the regimes.

The four gates of a unit are neighbouring columns of the product (order i, f, g, o), so that after one sum over the
warps they are split apart in place. Shapes as in :mod:`fastseq.ops.lstm` and :mod:`fastseq.ops.tape`; ``h_mask``,
``zoneout_h``, ``zoneout_c`` and ``peephole`` are as in the public API (recurrent dropout: Gal & Ghahramani 2016;
zoneout: Krueger et al. 2017; peepholes: Gers & Schmidhuber 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels import plan as planning
from fastseq.kernels.device import (
    CUT,
    PADDING,
    arrive,
    hold_weights,
    load_unit_rows,
    logistic,
    recurrent_product,
    settled,
    tanh,
    wait,
)
from fastseq.kernels.launch import (
    Launch,
    chip_of,
    expect,
    kernel_context,
    new_exchange,
    new_signals,
    ranges,
    resident_constants,
    tile_constants,
    whole_loads,
)
from fastseq.kernels.products import (
    input_precision,
    mask_gradient,
    padded_gates,
    previous_states,
    product,
    weight_gradient,
    wide_product,
    wide_state,
)
from fastseq.ops.needs import NEEDS_MASK, NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.tape import padded, tape_shapes

# Not part of what a kernel is compiled for: a new length, batch or position compiles nothing. (Strides are, since the
# width of a load depends on what divides them.)
_RUN_TIME = ["T", "B", "begin", "count"]


# One step of the cell on tiles [BB, BH] in float32. Loads come first in each kernel, so that they are under way while
# the recurrent product is waited for.


@triton.jit
def load_gates(gates, ok, gate_stride):
    """Four tiles, a gate each."""
    return (
        tl.load(gates, mask=ok, other=0.0),
        tl.load(gates + gate_stride, mask=ok, other=0.0),
        tl.load(gates + 2 * gate_stride, mask=ok, other=0.0),
        tl.load(gates + 3 * gate_stride, mask=ok, other=0.0),
    )


@triton.jit
def store_gates(gates, ok, gate_stride, values):
    """The same four tiles."""
    tl.store(gates, values[0], mask=ok)
    tl.store(gates + gate_stride, values[1], mask=ok)
    tl.store(gates + 2 * gate_stride, values[2], mask=ok)
    tl.store(gates + 3 * gate_stride, values[3], mask=ok)


@triton.jit
def cell_forward(a_i, a_f, a_g, a_o, c, p):
    """Gates i, f, g, o, the new cell state and the new h before rounding, from the sums a and the old cell state."""
    i = logistic(a_i + p[0] * c)
    f = logistic(a_f + p[1] * c)
    g = tanh(a_g)
    c_new = f * c + i * g
    o = logistic(a_o + p[2] * c_new)
    return i, f, g, o, c_new, o * tanh(c_new)


@triton.jit
def cell_backward(i, f, g, o, c, dh, dc, p):
    """The gradients of the four sums and of the old cell state ``c``, from those of the new h and the new cell state.

    The new cell state is made again from gates and old one, which costs less than reading it.
    """
    t = tanh(f * c + i * g)
    d_o = dh * t * o * (1.0 - o)
    d = dc + dh * o * (1.0 - t * t) + d_o * p[2]
    d_i = d * g * i * (1.0 - i)
    d_f = d * c * f * (1.0 - f)
    d_g = d * i * (1.0 - g * g)
    return d_i, d_f, d_g, d_o, d * f + d_i * p[0] + d_f * p[1]


@triton.jit
def zoned_out(before, fresh, zoneout, own, ok):
    """``before`` where the mask says so, or by a rate; ``zoneout`` may be None."""
    if zoneout is None:
        value = fresh
    elif zoneout.dtype.element_ty == tl.float32:
        rate = tl.load(zoneout)
        value = rate * before + (1.0 - rate) * fresh
    else:
        value = tl.where(tl.load(zoneout + own, mask=ok, other=0) != 0, before, fresh)
    return value


@triton.jit
def finish_forward(c_new, h_new, c, h, row_flags, own, ok, zoneout_h, zoneout_c):
    """What is carried and what is put out, (c, h, y), from the fresh cell state and h, after zoneout and padding; h is
    rounded to the dtype that it is carried in."""
    c_new = zoned_out(c, c_new, zoneout_c, own, ok)
    h_new = zoned_out(h, h_new, zoneout_h, own, ok).to(h.dtype)
    y = h_new
    if row_flags is not None:
        pad = (row_flags & PADDING)[:, None] != 0
        c_new = tl.where(pad, c, c_new)
        h_new = tl.where(pad, h, h_new)
        y = tl.where(pad, 0.0, y).to(y.dtype)
    return c_new, h_new, y


@triton.jit
def split_by_zoneout(d, zoneout, own, ok):
    """What of a gradient reaches the fresh value, and what passes by it to the step before."""
    past = tl.zeros_like(d)
    if zoneout is not None:
        if zoneout.dtype.element_ty == tl.float32:
            rate = tl.load(zoneout)
            past = rate * d
            d = (1.0 - rate) * d
        else:
            old = tl.load(zoneout + own, mask=ok, other=0) != 0
            past = tl.where(old, d, 0.0)
            d = tl.where(old, 0.0, d)
    return d, past


# Persistent and step.


@triton.jit(do_not_specialize=_RUN_TIME)
def lstm_forward_spread(
    gates,  # [T, B, GATES_STRIDE] float32: in, the input projection; out, the gates after activation (SAVE)
    w_hh,  # [4H, H]
    b_ih,  # [4H] or None
    b_hh,  # [4H] or None
    exchange,  # [2, B, HP], by turns what the product of a step and of the next one reads; in, the first's in place 1
    h_state,  # [B, H]: in, h0; out, h_n
    c_state,  # [B, H] float32: in, c0; out, c_n
    y,  # [T, B, H]
    c_tape,  # [T, B, HP] float32, or None
    flags,  # [T, B] uint8, or None
    h_mask,  # [B, H] or None
    zoneout_h,  # [T, B, H] uint8, a rate [1] float32, or None
    zoneout_c,  # [T, B, H] uint8, a rate [1] float32, or None
    peephole,  # [3, H] or None
    signals,  # [groups, SIGNALS] int32 at zero, or None
    T,
    B,
    begin,
    count,
    H: tl.constexpr,
    GATES_STRIDE: tl.constexpr,
    HP: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    W: tl.constexpr,
    HELD: tl.constexpr,
    REGISTERS: tl.constexpr,
    KC: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    SYNC: tl.constexpr,
    SIGNALS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Steps ``begin`` to ``begin + count``, in the order of the direction; grid (programs of a group, groups)."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    programs = tl.num_programs(0)
    batch = B.to(tl.int64)
    u = tile * BH + tl.arange(0, BH)
    n = tl.arange(0, 4 * BH)
    column = tile * BH + n // 4
    columns = ((n % 4) * H + column).to(tl.int64) * H
    held = hold_weights(w_hh, columns, column < H, 1, H, KC, FULL, LAST, HELD, REGISTERS, W)
    bias_ih = load_unit_rows(b_ih, u, u < H, H, 4)
    bias_hh = load_unit_rows(b_hh, u, u < H, H, 4)
    p = load_unit_rows(peephole, u, u < H, H, 3)
    if signals is not None:
        signals += group * SIGNALS
    epoch = 0
    for first in range(group * BB, B, tl.num_programs(1) * BB):
        b = (first + tl.arange(0, BB)).to(tl.int64)
        row_ok = b < B
        ok = row_ok[:, None] & (u < H)[None, :]
        tape_ok = row_ok[:, None] & (u < HP)[None, :]
        state = b[:, None] * H + u[None, :]
        c = tl.load(c_state + state, mask=ok, other=0.0)
        h = tl.load(h_state + state, mask=ok, other=0.0)
        if h_mask is not None:
            factors = tl.load(h_mask + state, mask=ok, other=0.0)
        for step in range(begin, begin + count):
            row = step * batch + b
            if REVERSE:
                row = (T - 1 - step) * batch + b
            own = row[:, None] * H + u[None, :]
            tape = gates + row[:, None] * GATES_STRIDE + u[None, :]
            x_i, x_f, x_g, x_o = load_gates(tape, ok, HP)
            here = row_ok
            row_flags = None
            if flags is not None:
                row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
                cut = (row_flags & CUT) != 0
                here = row_ok & (cut == 0)
                c = tl.where(cut[:, None], 0.0, c)
                h = tl.where(cut[:, None], 0.0, h).to(y.dtype.element_ty)
            # Of the two places the one that this step writes was last read before all arrived at the end of that step.
            read = exchange + ((step + 1) % 2 * batch + b) * HP
            written = exchange + (step % 2 * batch + b)[:, None] * HP + u[None, :]
            if signals is not None:
                if step > begin:
                    wait(signals, programs, epoch, SYNC, SIGNALS, INTERPRETED)
            z = recurrent_product(
                read,
                here,
                held,
                w_hh,
                columns,
                column < H,
                1,
                H,
                HP,
                KC,
                FULL,
                LAST,
                W,
                BB,
                4 * BH,
                HELD,
                REGISTERS,
                DEPTH,
                PRECISION,
            )
            even, odd = tl.split(tl.reshape(z, (BB, BH, 2, 2)))
            z_i, z_g = tl.split(even)
            z_f, z_o = tl.split(odd)
            i, f, g, o, c_new, h_new = cell_forward(
                z_i + x_i + bias_ih[0] + bias_hh[0],
                z_f + x_f + bias_ih[1] + bias_hh[1],
                z_g + x_g + bias_ih[2] + bias_hh[2],
                z_o + x_o + bias_ih[3] + bias_hh[3],
                c,
                p,
            )
            c, h, out = finish_forward(c_new, h_new, c, h, row_flags, own, ok, zoneout_h, zoneout_c)
            left = h
            if h_mask is not None:
                left = h * factors
            tl.store(written, tl.where(ok, left, 0.0).to(y.dtype.element_ty), mask=tape_ok)
            if signals is not None:
                if step + 1 < begin + count:
                    epoch += 1
                    arrive(signals, tile, epoch, SYNC)
            # Nobody waits for the rest.
            tl.store(y + own, out, mask=ok)
            if SAVE:
                store_gates(tape, tape_ok, HP, (i, f, g, o))
                tl.store(c_tape + row[:, None] * HP + u[None, :], c, mask=tape_ok)
        tl.store(c_state + state, c, mask=ok)
        tl.store(h_state + state, h, mask=ok)


@triton.jit(do_not_specialize=_RUN_TIME)
def lstm_backward_spread(
    grad_y,  # [T, B, H] or None
    w_hh,  # [4H, H]
    gates,  # [T, B, GATES_STRIDE] float32
    c_tape,  # [T, B, HP] float32
    c0,  # [B, H]
    dgates,  # [T, B, DGATES_STRIDE], a gate every H, then zeros up to BOUND: out
    dh_state,  # [B, H] float32: in, grad_h_n; out, what reaches h0 past the first step's product
    dc_state,  # [B, H] float32: in, grad_c_n; out, dc0
    flags,  # [T, B] uint8, or None
    h_mask,  # [B, H] or None
    zoneout_h,  # [T, B, H] uint8, a rate [1] float32, or None
    zoneout_c,  # [T, B, H] uint8, a rate [1] float32, or None
    peephole,  # [3, H] or None
    signals,  # [groups, SIGNALS] int32 at zero, or None
    T,
    B,
    begin,
    count,
    H: tl.constexpr,
    GATES_STRIDE: tl.constexpr,
    DGATES_STRIDE: tl.constexpr,
    HP: tl.constexpr,
    BOUND: tl.constexpr,
    REVERSE: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    W: tl.constexpr,
    HELD: tl.constexpr,
    REGISTERS: tl.constexpr,
    KC: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    SYNC: tl.constexpr,
    SIGNALS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Steps ``begin + count - 1`` down to ``begin``; a program owns the gradients of its units."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    programs = tl.num_programs(0)
    batch = B.to(tl.int64)
    u = tile * BH + tl.arange(0, BH)
    unit_ok = u < H
    held = hold_weights(w_hh, u, unit_ok, H, 4 * H, KC, FULL, LAST, HELD, REGISTERS, W)
    p = load_unit_rows(peephole, u, unit_ok, H, 3)
    if signals is not None:
        signals += group * SIGNALS
    epoch = 0
    for first in range(group * BB, B, tl.num_programs(1) * BB):
        b = (first + tl.arange(0, BB)).to(tl.int64)
        row_ok = b < B
        ok = row_ok[:, None] & unit_ok[None, :]
        state = b[:, None] * H + u[None, :]
        dh_past = tl.load(dh_state + state, mask=ok, other=0.0)
        dc = tl.load(dc_state + state, mask=ok, other=0.0)
        for n in range(count):
            step = begin + count - 1 - n
            if REVERSE:
                row = (T - 1 - step) * batch + b
                before = row + batch
                after = row - batch
            else:
                row = step * batch + b
                before = row - batch
                after = row + batch
            own = row[:, None] * H + u[None, :]
            i, f, g, o = load_gates(gates + row[:, None] * GATES_STRIDE + u[None, :], ok, HP)
            c = tl.load(c_tape + before[:, None] * HP + u[None, :], mask=ok & (step > 0), other=0.0)
            c += tl.load(c0 + state, mask=ok & (step == 0), other=0.0).to(tl.float32)
            dy = tl.zeros([BB, BH], dtype=tl.float32)
            if grad_y is not None:
                dy = tl.load(grad_y + own, mask=ok, other=0.0).to(tl.float32)
            here = row_ok & (step + 1 < T)
            if flags is not None:
                row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
                cut = (row_flags & CUT)[:, None] != 0
                pad = (row_flags & PADDING)[:, None] != 0
                here = here & ((tl.load(flags + after, mask=here, other=0) & CUT) == 0)
                c = tl.where(cut, 0.0, c)
                dy = tl.where(pad, 0.0, dy)
            if signals is not None:
                if n > 0:
                    wait(signals, programs, epoch, SYNC, SIGNALS, INTERPRETED)
            product = recurrent_product(
                dgates + after * DGATES_STRIDE,
                here,
                held,
                w_hh,
                u,
                unit_ok,
                H,
                4 * H,
                BOUND,
                KC,
                FULL,
                LAST,
                W,
                BB,
                BH,
                HELD,
                REGISTERS,
                DEPTH,
                PRECISION,
            )
            product = settled(product, BB, BH, BH)
            if h_mask is not None:
                product *= tl.load(h_mask + state, mask=ok, other=0.0).to(tl.float32)
            dh = dh_past + product + dy
            dh_new, dh_past = split_by_zoneout(dh, zoneout_h, own, ok)
            dc_new, dc_past = split_by_zoneout(dc, zoneout_c, own, ok)
            d_i, d_f, d_g, d_o, dc_old = cell_backward(i, f, g, o, c, dh_new, dc_new, p)
            dc_old += dc_past
            if flags is not None:
                d_i = tl.where(pad, 0.0, d_i)
                d_f = tl.where(pad, 0.0, d_f)
                d_g = tl.where(pad, 0.0, d_g)
                d_o = tl.where(pad, 0.0, d_o)
                dc_old = tl.where(cut, 0.0, tl.where(pad, dc, dc_old))
                dh_past = tl.where(cut, 0.0, tl.where(pad, dh, dh_past))
            dc = dc_old
            kind = dgates.dtype.element_ty
            store_gates(
                dgates + row[:, None] * DGATES_STRIDE + u[None, :],
                ok,
                H,
                (d_i.to(kind), d_f.to(kind), d_g.to(kind), d_o.to(kind)),
            )
            if signals is not None:
                if n + 1 < count:
                    epoch += 1
                    arrive(signals, tile, epoch, SYNC)
        tl.store(dh_state + state, dh_past, mask=ok)
        tl.store(dc_state + state, dc, mask=ok)


# Resident: h never leaves the chip, and no program reads what another wrote.


@triton.jit
def resident_weights(w_hh, GATE: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BACKWARD: tl.constexpr):
    """The weights of one gate as the right factor of the product: [K, units] forwards, [units, K] backwards."""
    m = tl.arange(0, BH)
    rows, columns = (m[:, None], m[None, :]) if BACKWARD else (m[None, :], m[:, None])
    return tl.load(w_hh + (GATE * H + rows) * H + columns, mask=(rows < H) & (columns < H), other=0.0)


@triton.jit(do_not_specialize=_RUN_TIME)
def lstm_forward_resident(
    gates,
    w_hh,
    b_ih,
    b_hh,
    h_state,
    c_state,
    y,
    c_tape,
    flags,
    h_mask,
    zoneout_h,
    zoneout_c,
    peephole,
    T,
    B,
    H: tl.constexpr,
    GATES_STRIDE: tl.constexpr,
    HP: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the batch through all steps; arguments as of :func:`lstm_forward_spread`, BH at least H."""
    batch = B.to(tl.int64)
    u = tl.arange(0, BH)
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    row_ok = b < B
    ok = row_ok[:, None] & (u < H)[None, :]
    tape_ok = row_ok[:, None] & (u < HP)[None, :]
    state = b[:, None] * H + u[None, :]
    r_i = resident_weights(w_hh, 0, H, BH, False)
    r_f = resident_weights(w_hh, 1, H, BH, False)
    r_g = resident_weights(w_hh, 2, H, BH, False)
    r_o = resident_weights(w_hh, 3, H, BH, False)
    bias_ih = load_unit_rows(b_ih, u, u < H, H, 4)
    bias_hh = load_unit_rows(b_hh, u, u < H, H, 4)
    p = load_unit_rows(peephole, u, u < H, H, 3)
    c = tl.load(c_state + state, mask=ok, other=0.0)
    h = tl.load(h_state + state, mask=ok, other=0.0)
    row = b
    if REVERSE:
        row = (T - 1) * batch + b
    if PREFETCH:  # a step ahead, where the registers suffice
        x_i, x_f, x_g, x_o = load_gates(gates + row[:, None] * GATES_STRIDE + u[None, :], ok, HP)
    for step in range(T):
        own = row[:, None] * H + u[None, :]
        tape = gates + row[:, None] * GATES_STRIDE + u[None, :]
        after = row + batch
        if REVERSE:
            after = row - batch
        if PREFETCH:
            next_tape = gates + after[:, None] * GATES_STRIDE + u[None, :]
            n_i, n_f, n_g, n_o = load_gates(next_tape, ok & (step + 1 < T), HP)
        else:
            x_i, x_f, x_g, x_o = load_gates(tape, ok, HP)
        row_flags = None
        if flags is not None:
            row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
            cut = (row_flags & CUT)[:, None] != 0
            c = tl.where(cut, 0.0, c)
            h = tl.where(cut, 0.0, h).to(y.dtype.element_ty)
        left = h
        if h_mask is not None:
            left = h * tl.load(h_mask + state, mask=ok, other=0.0)
        z_i = settled(tl.dot(left, r_i, input_precision=PRECISION), BB, BH, WIDTH)
        z_f = settled(tl.dot(left, r_f, input_precision=PRECISION), BB, BH, WIDTH)
        z_g = settled(tl.dot(left, r_g, input_precision=PRECISION), BB, BH, WIDTH)
        z_o = settled(tl.dot(left, r_o, input_precision=PRECISION), BB, BH, WIDTH)
        i, f, g, o, c_new, h_new = cell_forward(
            z_i + x_i + bias_ih[0] + bias_hh[0],
            z_f + x_f + bias_ih[1] + bias_hh[1],
            z_g + x_g + bias_ih[2] + bias_hh[2],
            z_o + x_o + bias_ih[3] + bias_hh[3],
            c,
            p,
        )
        c, h, out = finish_forward(c_new, h_new, c, h, row_flags, own, ok, zoneout_h, zoneout_c)
        tl.store(y + own, out, mask=ok)
        if SAVE:
            store_gates(tape, tape_ok, HP, (i, f, g, o))
            tl.store(c_tape + row[:, None] * HP + u[None, :], c, mask=tape_ok)
        if PREFETCH:
            x_i, x_f, x_g, x_o = n_i, n_f, n_g, n_o
        row = after
    tl.store(c_state + state, c, mask=ok)
    tl.store(h_state + state, h, mask=ok)


@triton.jit(do_not_specialize=_RUN_TIME)
def lstm_backward_resident(
    grad_y,
    w_hh,
    gates,
    c_tape,
    c0,
    dgates,
    dh_state,
    dc_state,
    flags,
    h_mask,
    zoneout_h,
    zoneout_c,
    peephole,
    T,
    B,
    H: tl.constexpr,
    GATES_STRIDE: tl.constexpr,
    DGATES_STRIDE: tl.constexpr,
    HP: tl.constexpr,
    REVERSE: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As :func:`lstm_backward_spread`; ``dh_state`` receives all that reaches h0 but the first step's product."""
    batch = B.to(tl.int64)
    u = tl.arange(0, BH)
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    row_ok = b < B
    ok = row_ok[:, None] & (u < H)[None, :]
    state = b[:, None] * H + u[None, :]
    r_i = resident_weights(w_hh, 0, H, BH, True)
    r_f = resident_weights(w_hh, 1, H, BH, True)
    r_g = resident_weights(w_hh, 2, H, BH, True)
    r_o = resident_weights(w_hh, 3, H, BH, True)
    p = load_unit_rows(peephole, u, u < H, H, 3)
    kind = dgates.dtype.element_ty
    dh = tl.load(dh_state + state, mask=ok, other=0.0)
    dc = tl.load(dc_state + state, mask=ok, other=0.0)
    dh_past = dh
    for n in range(T):
        step = T - 1 - n
        if REVERSE:
            row = n * batch + b
            before = row + batch
        else:
            row = step * batch + b
            before = row - batch
        own = row[:, None] * H + u[None, :]
        i, f, g, o = load_gates(gates + row[:, None] * GATES_STRIDE + u[None, :], ok, HP)
        c = tl.load(c_tape + before[:, None] * HP + u[None, :], mask=ok & (step > 0), other=0.0)
        c += tl.load(c0 + state, mask=ok & (step == 0), other=0.0).to(tl.float32)
        dy = tl.zeros([BB, BH], dtype=tl.float32)
        if grad_y is not None:
            dy = tl.load(grad_y + own, mask=ok, other=0.0).to(tl.float32)
        if flags is not None:
            row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
            cut = (row_flags & CUT)[:, None] != 0
            pad = (row_flags & PADDING)[:, None] != 0
            c = tl.where(cut, 0.0, c)
            dy = tl.where(pad, 0.0, dy)
        dh += dy
        dh_new, dh_past = split_by_zoneout(dh, zoneout_h, own, ok)
        dc_new, dc_past = split_by_zoneout(dc, zoneout_c, own, ok)
        d_i, d_f, d_g, d_o, dc_old = cell_backward(i, f, g, o, c, dh_new, dc_new, p)
        dc_old += dc_past
        if flags is not None:
            d_i = tl.where(pad, 0.0, d_i)
            d_f = tl.where(pad, 0.0, d_f)
            d_g = tl.where(pad, 0.0, d_g)
            d_o = tl.where(pad, 0.0, d_o)
            dc_old = tl.where(cut, 0.0, tl.where(pad, dc, dc_old))
            dh_past = tl.where(cut, 0.0, tl.where(pad, dh, dh_past))
        dc = dc_old
        values = (d_i.to(kind), d_f.to(kind), d_g.to(kind), d_o.to(kind))
        store_gates(dgates + row[:, None] * DGATES_STRIDE + u[None, :], ok, H, values)
        dh = tl.dot(values[0], r_i, input_precision=PRECISION)
        dh = tl.dot(values[1], r_f, dh, input_precision=PRECISION)
        dh = tl.dot(values[2], r_g, dh, input_precision=PRECISION)
        dh = settled(tl.dot(values[3], r_o, dh, input_precision=PRECISION), BB, BH, WIDTH)
        if h_mask is not None:
            dh *= tl.load(h_mask + state, mask=ok, other=0.0).to(tl.float32)
        if flags is not None:
            dh = tl.where(cut, 0.0, dh)
        dh += dh_past
    tl.store(dh_state + state, dh_past, mask=ok)
    tl.store(dc_state + state, dc, mask=ok)


# Launchers.


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
    h_mask: Tensor | None,
    zoneout_h: Tensor | float | None,
    zoneout_c: Tensor | float | None,
    peephole: Tensor | None,
) -> tuple[int, int, int]:
    """The sizes (T, B, H), with every input found to have the size they say."""
    if w_hr is not None:
        raise RuntimeError(
            "the GPU kernels of lstm have no proj_size: with a projection between h and the next step's product a step "
            "needs two exchanges between its programs instead of one; unset FASTSEQ_IMPL, or use the reference"
        )
    steps, batch, inputs = x.shape
    hidden = w_hh.shape[0] // 4
    dtype = x.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(
            f"the GPU kernels of lstm serve float32, float16 and bfloat16, not {dtype}; use the reference"
        )
    expect(
        (
            ("h0", h0, (batch, hidden), dtype),
            ("c0", c0, (batch, hidden), dtype),
            ("w_ih", w_ih, (4 * hidden, inputs), dtype),
            ("w_hh", w_hh, (4 * hidden, hidden), dtype),
            ("b_ih", b_ih, (4 * hidden,), dtype),
            ("b_hh", b_hh, (4 * hidden,), dtype),
            ("flags", flags, (steps, batch), torch.uint8),
            ("h_mask", h_mask, (batch, hidden), dtype),
            *(
                (name, value, (steps, batch, hidden), torch.bool)
                for name, value in (("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c))
                if isinstance(value, Tensor)
            ),
            ("peephole", peephole, (3, hidden), dtype),
        ),
        x.device,
    )
    return steps, batch, hidden


def plan_for(
    steps: int, batch: int, hidden: int, dtype: torch.dtype, device: torch.device, backward: bool
) -> planning.Plan:
    """The plan that a call of this shape takes."""
    shape = planning.Shape(4, backward, steps, batch, hidden, dtype.itemsize)
    return planning.choose(shape, chip_of(device), input_precision(dtype))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _in_memory(zoneout: Tensor | float | None, device: torch.device) -> Tensor | None:
    """As the kernels read it: a mask in bytes, a rate as a tensor of one number."""
    if isinstance(zoneout, float):
        return torch.full((1,), zoneout, dtype=torch.float32, device=device)
    return None if zoneout is None else zoneout.contiguous().view(torch.uint8)


def forward_launches(
    plan: planning.Plan,
    gates: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h_state: Tensor,
    c_state: Tensor,
    y: Tensor,
    c: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    peephole: Tensor | None = None,
) -> Iterator[Launch]:
    """The launches of the recurrence, by a plan. Every tensor is dense but ``gates``, whose rows may lie apart."""
    steps, batch, hidden = y.shape
    common: dict[str, Tensor | int | None] = {
        "gates": gates,
        "w_hh": w_hh,
        "b_ih": b_ih,
        "b_hh": b_hh,
        "h_state": h_state,
        "c_state": c_state,
        "y": y,
        "c_tape": c,
        "flags": flags,
        "h_mask": h_mask,
        "zoneout_h": zoneout_h,
        "zoneout_c": zoneout_c,
        "peephole": peephole,
        "T": steps,
        "B": batch,
    }
    constants = {
        "H": hidden,
        "HP": padded(hidden),
        "GATES_STRIDE": gates.stride(1),
        "REVERSE": reverse,
        "SAVE": c is not None,
    }
    if plan.regime == "resident":
        # Four gates go to a tape in float32, one h comes out.
        stored = w_hh.dtype if c is None else torch.float32
        yield Launch(lstm_forward_resident, plan, common, constants | resident_constants(plan, stored))
        return
    common |= {"exchange": new_exchange(h_state, h_mask), "signals": new_signals(plan, y.device)}
    for begin, count in ranges(plan, steps, backward=False):
        arguments = common | {"begin": begin, "count": count}
        yield Launch(lstm_forward_spread, plan, arguments, constants | tile_constants(plan))


def backward_launches(
    plan: planning.Plan,
    grad_y: Tensor | None,
    w_hh: Tensor,
    gates: Tensor,
    c: Tensor,
    c0: Tensor,
    dgates: Tensor,
    dh_state: Tensor,
    dc_state: Tensor,
    flags: Tensor | None,
    reverse: bool,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    peephole: Tensor | None = None,
) -> Iterator[Launch]:
    """The launches of BPTT, by a plan. Every tensor is dense but ``gates`` and ``dgates``, whose rows may lie apart;
    those of ``dgates`` are whole loads, with zeros after the four gates."""
    steps, batch, width = c.shape
    common: dict[str, Tensor | int | None] = {
        "grad_y": grad_y,
        "w_hh": w_hh,
        "gates": gates,
        "c_tape": c,
        "c0": c0,
        "dgates": dgates,
        "dh_state": dh_state,
        "dc_state": dc_state,
        "flags": flags,
        "h_mask": h_mask,
        "zoneout_h": zoneout_h,
        "zoneout_c": zoneout_c,
        "peephole": peephole,
        "T": steps,
        "B": batch,
    }
    constants = {
        "H": c0.shape[1],
        "HP": width,
        "GATES_STRIDE": gates.stride(1),
        "DGATES_STRIDE": dgates.stride(1),
        "REVERSE": reverse,
    }
    if plan.regime == "resident":
        yield Launch(lstm_backward_resident, plan, common, constants | resident_constants(plan, w_hh.dtype))
        return
    common |= {"signals": new_signals(plan, c.device)}
    constants["BOUND"] = whole_loads(4 * c0.shape[1], dgates.dtype)
    for begin, count in ranges(plan, steps, backward=True):
        arguments = common | {"begin": begin, "count": count}
        yield Launch(lstm_backward_spread, plan, arguments, constants | tile_constants(plan))


def run_forward(*arguments: Any) -> None:
    """The recurrence of a forward in Triton; arguments of :func:`forward_launches` but its plan."""
    y = arguments[6]
    steps, batch, hidden = y.shape
    plan = plan_for(steps, batch, hidden, y.dtype, y.device, backward=False)
    for launch in forward_launches(plan, *arguments):
        launch.run()


def run_backward(*arguments: Any) -> None:
    """The recurrence of a backward in Triton; arguments of :func:`backward_launches` but its plan."""
    _, w_hh, _, c, c0 = arguments[:5]
    batch, hidden = c0.shape
    plan = plan_for(len(c), batch, hidden, w_hh.dtype, w_hh.device, backward=True)
    for launch in backward_launches(plan, *arguments):
        launch.run()


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
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | float | None = None,
    zoneout_c: Tensor | float | None = None,
    peephole: Tensor | None = None,
    recurrence: Callable[..., None] = run_forward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(y, h_n, c_n, c, gates)``; the tape ``c``, ``gates`` is empty unless ``save``.

    Args:
        h_mask: ``[B, H]``, multiplies h_{t-1} before the recurrent product.
        zoneout_h: bool ``[T, B, H]``: where true, h_t is h_{t-1}. Or a rate r: it is r h_{t-1} and 1 - r of the fresh.
        zoneout_c: the same of the cell; h_t is made from the fresh cell state all the same.
        peephole: ``[3, H]``, rows i, f, o: i and f see c_{t-1}, o sees the fresh c_t.
        recurrence: what walks through time, called like :func:`run_forward`.

    Raises:
        RuntimeError: there is a projection, or the dtype is float64.
        ValueError: a tensor has the wrong size, dtype or device.
    """
    steps, batch, hidden = _check(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags, h_mask, zoneout_h, zoneout_c, peephole
    )
    width = padded(hidden)
    c_shape, gates_shape = tape_shapes(steps, batch, hidden)
    with kernel_context(x):
        y = x.new_empty((steps, batch, hidden))
        gates = x.new_empty(gates_shape, dtype=torch.float32)
        c = x.new_empty(c_shape if save else (0,), dtype=torch.float32)
        h_n, c_state = h0.clone(memory_format=torch.contiguous_format), c0.to(torch.float32, copy=True).contiguous()
        if batch:
            # One product for all steps, straight into the tape.
            columns = gates.flatten(0, 1)[:, : 4 * width]
            wide_product(x.flatten(0, 1), padded_gates(w_ih, 4, width).t(), columns)
            recurrence(
                gates,
                w_hh.contiguous(),
                _dense(b_ih),
                _dense(b_hh),
                h_n,
                c_state,
                y,
                c if save else None,
                _dense(flags),
                reverse,
                _dense(h_mask),
                _in_memory(zoneout_h, x.device),
                _in_memory(zoneout_c, x.device),
                _dense(peephole),
            )
        return y, h_n, c_state.to(x.dtype), c, gates if save else gates.new_empty(0)


def _backward(
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
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | float | None = None,
    zoneout_c: Tensor | float | None = None,
    peephole: Tensor | None = None,
    overwrite: bool = False,
    recurrence: Callable[..., None] = run_backward,
) -> tuple[Tensor, ...]:
    """``(dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr, dh_mask, dpeephole)``, empty where not needed or not there.

    ``overwrite`` lets the gates' gradients take the place of the gates. Half types keep them apart, in half type, which
    is what the products after the recurrence read. ``recurrence`` is called like :func:`run_backward`, other arguments
    as of :func:`lstm_fwd`.
    """
    steps, batch, hidden = _check(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags, h_mask, zoneout_h, zoneout_c, peephole
    )
    c_shape, gates_shape = tape_shapes(steps, batch, hidden)
    expect(
        (
            ("grad_y", grad_y, (steps, batch, hidden), x.dtype),
            ("grad_h_n", grad_h_n, (batch, hidden), x.dtype),
            ("grad_c_n", grad_c_n, (batch, hidden), x.dtype),
            ("y", y, (steps, batch, hidden), x.dtype),
            ("c", c, c_shape, torch.float32),
            ("gates", gates, gates_shape, torch.float32),
        ),
        x.device,
    )
    with kernel_context(x):
        none = x.new_empty(0)
        in_place = overwrite and x.dtype == torch.float32 and hidden == padded(hidden) and peephole is None
        if in_place:
            dgates = gates
        else:
            dgates = x.new_empty((steps, batch, whole_loads(4 * hidden, x.dtype)))
            dgates[..., 4 * hidden :] = 0.0
        dh0, dc0 = wide_state(grad_h_n, h0), wide_state(grad_c_n, c0)
        gates, w_hh = gates.contiguous(), w_hh.contiguous()
        if batch:
            recurrence(
                _dense(grad_y),
                w_hh,
                gates,
                c.contiguous(),
                c0.contiguous(),
                dgates,
                dh0,
                dc0,
                _dense(flags),
                reverse,
                _dense(h_mask),
                _in_memory(zoneout_h, x.device),
                _in_memory(zoneout_c, x.device),
                _dense(peephole),
            )
        rows = dgates.flatten(0, 1)[:, : 4 * hidden]
        dx = product(rows, w_ih).view(x.shape) if needs & NEEDS_X else none
        if needs & NEEDS_STATE:
            first = steps - 1 if reverse else 0
            arriving = wide_product(dgates[first, :, : 4 * hidden], w_hh)
            if h_mask is not None:
                arriving = arriving * h_mask
            if flags is not None:
                arriving = arriving.masked_fill((flags[first] & 1).bool().unsqueeze(1), 0.0)
            dh0, dc0 = (dh0 + arriving).to(x.dtype), dc0.to(x.dtype)
        else:
            dh0 = dc0 = none
        dw_ih = dw_hh = db = none
        if needs & NEEDS_WEIGHTS:
            dw_ih = weight_gradient(rows, x)
            dw_hh = weight_gradient(rows, previous_states(y, h0, flags, reverse, h_mask))
            if b_ih is not None or b_hh is not None:
                db = rows.sum(0, dtype=torch.float32).to(x.dtype)
        dpeephole = dh_mask = none
        if peephole is not None and needs & NEEDS_WEIGHTS:
            dpeephole = _peephole_gradient(dgates, gates, c, c0, flags, reverse)
        if h_mask is not None and needs & NEEDS_MASK:
            dh_mask = mask_gradient(rows, w_hh, previous_states(y, h0, flags, reverse))
        return dx, dh0, dc0, dw_ih, dw_hh, db, none, dh_mask, dpeephole


def lstm_bwd(*args: Any, overwrite: bool = False, recurrence: Callable[..., None] = run_backward) -> tuple[Tensor, ...]:
    """``(dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr)``; arguments as of :func:`_backward`, without options."""
    return _backward(*args, overwrite=overwrite, recurrence=recurrence)[:7]


def lstm_bwd_(*args: Any, recurrence: Callable[..., None] = run_backward) -> tuple[Tensor, ...]:
    """:func:`lstm_bwd`, free to overwrite the gates (the argument at place 14)."""
    torch.autograd.graph.increment_version(args[14])
    return lstm_bwd(*args, overwrite=True, recurrence=recurrence)


# The operation with options, of which fastseq.ops.dispatch.SERVED names those that a call may use here; the other
# arguments can be left out.


def _options(tensors: tuple[Any, ...], rate_h: float, rate_c: float) -> dict[str, Any]:
    """Those options that the launchers take, from the tensors of options and the rates of zoneout."""
    _, _, h_mask, zoneout_h, zoneout_c, peephole, *_ = tensors
    return {
        "h_mask": h_mask,
        "zoneout_h": (rate_h or None) if zoneout_h is None else zoneout_h,
        "zoneout_c": (rate_c or None) if zoneout_c is None else zoneout_c,
        "peephole": peephole,
    }


def lstm_options_fwd(*args: Any, recurrence: Callable[..., None] = run_forward) -> tuple[Tensor, ...]:
    """:func:`lstm_fwd` for a call of ``fastseq::lstm_options_fwd``."""
    given: Any = (*args[:9], args[21], args[-1])
    return lstm_fwd(*given, **_options(args[9:21], *args[22:24]), recurrence=recurrence)


def lstm_options_bwd(
    *args: Any, overwrite: bool = False, recurrence: Callable[..., None] = run_backward
) -> tuple[Tensor, ...]:
    """Its backward; the gradients of what is not served are empty."""
    given: Any = (*args[:3], *args[5:14], *args[26:30], args[-1])
    options = _options(args[14:26], *args[30:32])
    *plain, dh_mask, dpeephole = _backward(*given, **options, overwrite=overwrite, recurrence=recurrence)
    none = dh_mask.new_empty(0)
    return (*plain, none, none, dh_mask, dpeephole, *(none.clone() for _ in range(6)))


def lstm_options_bwd_(*args: Any, recurrence: Callable[..., None] = run_backward) -> tuple[Tensor, ...]:
    """:func:`lstm_options_bwd`, free to overwrite the gates (the argument at place 28)."""
    torch.autograd.graph.increment_version(args[28])
    return lstm_options_bwd(*args, overwrite=True, recurrence=recurrence)


def _peephole_gradient(
    dgates: Tensor, gates: Tensor, c: Tensor, c0: Tensor, flags: Tensor | None, reverse: bool
) -> Tensor:
    """``[3, H]``: the sums over time and batch of each gate's gradient times the cell state that it saw."""
    hidden = c0.shape[1]
    width = c.shape[2]
    d_i, d_f, _, d_o = dgates[..., : 4 * hidden].float().unflatten(-1, (4, hidden)).unbind(-2)
    i, f, g, _ = (gate[..., :hidden] for gate in gates[..., : 4 * width].unflatten(-1, (4, width)).unbind(-2))
    before = previous_states(c[..., :hidden], c0.float(), None, reverse)
    if flags is not None:  # the tape carries the cell state through padding, so only a cut matters
        before = before.masked_fill((flags & 1).bool().unsqueeze(2), 0.0)
    sums = [(d_i * before).sum((0, 1)), (d_f * before).sum((0, 1)), (d_o * (f * before + i * g)).sum((0, 1))]
    return torch.stack(sums).to(c0.dtype)
