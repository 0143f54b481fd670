"""Elman RNN in Triton: one layer in one direction, forward and BPTT. The idea and the regimes are those of
:mod:`fastseq.kernels.lstm`; the input projection is made straight into the tape, where the slopes take its place.

Shapes as in :mod:`fastseq.ops.rnn` and :mod:`fastseq.ops.tape`; ``h_mask`` is as in the public API.
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
    activation,
    arrive,
    hold_weights,
    load_unit_rows,
    recurrent_product,
    settled,
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
from fastseq.ops.tape import padded, slopes_shape

NONLINEARITIES = ("tanh", "relu", "sigmoid")
# Not part of what a kernel is compiled for: a new length, batch or position compiles nothing. (Strides are, since the
# width of a load depends on what divides them.)
_RUN_TIME = ["T", "B", "begin", "count"]


@triton.jit(do_not_specialize=_RUN_TIME)
def rnn_forward_spread(
    tape,  # [T, B, TAPE_STRIDE] float32: in, the input projection; out, the slopes (SAVE)
    w_hh,  # [H, H]
    b_ih,  # [H] or None
    b_hh,  # [H] or None
    exchange,  # [2, B, HP], by turns what the product of a step and of the next one reads; in, the first's in place 1
    h_state,  # [B, H]: in, h0; out, h_n
    y,  # [T, B, H]
    flags,  # [T, B] uint8, or None
    h_mask,  # [B, H] or None
    signals,  # [groups, SIGNALS] int32 at zero, or None
    T,
    B,
    begin,
    count,
    H: tl.constexpr,
    TAPE_STRIDE: tl.constexpr,
    HP: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    NONLINEARITY: tl.constexpr,
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
    columns = u.to(tl.int64) * H
    held = hold_weights(w_hh, columns, u < H, 1, H, KC, FULL, LAST, HELD, REGISTERS, W)
    bias = load_unit_rows(b_ih, u, u < H, H, 1)[0] + load_unit_rows(b_hh, u, u < H, H, 1)[0]
    if signals is not None:
        signals += group * SIGNALS
    epoch = 0
    for first in range(group * BB, B, tl.num_programs(1) * BB):
        b = (first + tl.arange(0, BB)).to(tl.int64)
        row_ok = b < B
        ok = row_ok[:, None] & (u < H)[None, :]
        tape_ok = row_ok[:, None] & (u < HP)[None, :]
        state = b[:, None] * H + u[None, :]
        h = tl.load(h_state + state, mask=ok, other=0.0)
        if h_mask is not None:
            factors = tl.load(h_mask + state, mask=ok, other=0.0)
        for step in range(begin, begin + count):
            row = step * batch + b
            if REVERSE:
                row = (T - 1 - step) * batch + b
            own = row[:, None] * H + u[None, :]
            place = tape + row[:, None] * TAPE_STRIDE + u[None, :]
            x = tl.load(place, mask=ok, other=0.0)
            here = row_ok
            if flags is not None:
                row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
                here = row_ok & ((row_flags & CUT) == 0)
                pad = (row_flags & PADDING)[:, None] != 0
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
                u < H,
                1,
                H,
                HP,
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
            z = settled(z, BB, BH, BH)
            value, slope = activation(z + x + bias, NONLINEARITY)
            out = value.to(y.dtype.element_ty)
            if flags is not None:
                h = tl.where(pad, h, out)
                out = tl.where(pad, 0.0, out).to(y.dtype.element_ty)
            else:
                h = out
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
                tl.store(place, slope, mask=tape_ok)
        tl.store(h_state + state, h, mask=ok)


@triton.jit(do_not_specialize=_RUN_TIME)
def rnn_backward_spread(
    grad_y,  # [T, B, H] or None
    w_hh,  # [H, H]
    tape,  # [T, B, TAPE_STRIDE] float32: the slopes
    dsums,  # [T, B, DSUMS_STRIDE]: out, the gradients of the sums under the nonlinearity, then zeros up to BOUND
    dh_state,  # [B, H] float32: in, grad_h_n; out, what reaches h0 past the first step's product
    flags,  # [T, B] uint8, or None
    h_mask,  # [B, H] or None
    signals,  # [groups, SIGNALS] int32 at zero, or None
    T,
    B,
    begin,
    count,
    H: tl.constexpr,
    TAPE_STRIDE: tl.constexpr,
    DSUMS_STRIDE: tl.constexpr,
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
    held = hold_weights(w_hh, u, unit_ok, H, H, KC, FULL, LAST, HELD, REGISTERS, W)
    if signals is not None:
        signals += group * SIGNALS
    epoch = 0
    for first in range(group * BB, B, tl.num_programs(1) * BB):
        b = (first + tl.arange(0, BB)).to(tl.int64)
        row_ok = b < B
        ok = row_ok[:, None] & unit_ok[None, :]
        store_ok = row_ok[:, None] & (u < BOUND)[None, :]
        state = b[:, None] * H + u[None, :]
        dh_past = tl.load(dh_state + state, mask=ok, other=0.0)
        for n in range(count):
            step = begin + count - 1 - n
            if REVERSE:
                row = (T - 1 - step) * batch + b
                after = row - batch
            else:
                row = step * batch + b
                after = row + batch
            slope = tl.load(tape + row[:, None] * TAPE_STRIDE + u[None, :], mask=ok, other=0.0)
            dy = tl.zeros([BB, BH], dtype=tl.float32)
            if grad_y is not None:
                dy = tl.load(grad_y + row[:, None] * H + u[None, :], mask=ok, other=0.0).to(tl.float32)
            here = row_ok & (step + 1 < T)
            if flags is not None:
                row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
                cut = (row_flags & CUT)[:, None] != 0
                pad = (row_flags & PADDING)[:, None] != 0
                here = here & ((tl.load(flags + after, mask=here, other=0) & CUT) == 0)
                dy = tl.where(pad, 0.0, dy)
            if signals is not None:
                if n > 0:
                    wait(signals, programs, epoch, SYNC, SIGNALS, INTERPRETED)
            product = recurrent_product(
                dsums + after * DSUMS_STRIDE,
                here,
                held,
                w_hh,
                u,
                unit_ok,
                H,
                H,
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
            d = dh * slope
            dh_past = tl.zeros_like(dh)
            if flags is not None:
                d = tl.where(pad, 0.0, d)
                dh_past = tl.where(pad & (cut == 0), dh, 0.0)
            value = tl.where(ok, d, 0.0).to(dsums.dtype.element_ty)
            tl.store(dsums + row[:, None] * DSUMS_STRIDE + u[None, :], value, mask=store_ok)
            if signals is not None:
                if n + 1 < count:
                    epoch += 1
                    arrive(signals, tile, epoch, SYNC)
        tl.store(dh_state + state, dh_past, mask=ok)


@triton.jit
def resident_weights(w_hh, H: tl.constexpr, BH: tl.constexpr, BACKWARD: tl.constexpr):
    """The right factor of the product: the transposed weights forwards, [K, units], the weights backwards."""
    m = tl.arange(0, BH)
    rows, columns = (m[:, None], m[None, :]) if BACKWARD else (m[None, :], m[:, None])
    return tl.load(w_hh + rows * H + columns, mask=(rows < H) & (columns < H), other=0.0)


@triton.jit(do_not_specialize=_RUN_TIME)
def rnn_forward_resident(
    tape,
    w_hh,
    b_ih,
    b_hh,
    h_state,
    y,
    flags,
    h_mask,
    T,
    B,
    H: tl.constexpr,
    TAPE_STRIDE: tl.constexpr,
    HP: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    NONLINEARITY: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the batch through all steps; arguments as of :func:`rnn_forward_spread`, BH at least H."""
    batch = B.to(tl.int64)
    u = tl.arange(0, BH)
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    row_ok = b < B
    ok = row_ok[:, None] & (u < H)[None, :]
    tape_ok = row_ok[:, None] & (u < HP)[None, :]
    state = b[:, None] * H + u[None, :]
    weights = resident_weights(w_hh, H, BH, False)
    bias = load_unit_rows(b_ih, u, u < H, H, 1)[0] + load_unit_rows(b_hh, u, u < H, H, 1)[0]
    h = tl.load(h_state + state, mask=ok, other=0.0)
    row = b
    if REVERSE:
        row = (T - 1) * batch + b
    if PREFETCH:  # a step ahead, where the registers suffice
        x = tl.load(tape + row[:, None] * TAPE_STRIDE + u[None, :], mask=ok, other=0.0)
    for step in range(T):
        own = row[:, None] * H + u[None, :]
        place = tape + row[:, None] * TAPE_STRIDE + u[None, :]
        after = row + batch
        if REVERSE:
            after = row - batch
        if PREFETCH:
            x_next = tl.load(tape + after[:, None] * TAPE_STRIDE + u[None, :], mask=ok & (step + 1 < T), other=0.0)
        else:
            x = tl.load(place, mask=ok, other=0.0)
        if flags is not None:
            row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
            pad = (row_flags & PADDING)[:, None] != 0
            h = tl.where((row_flags & CUT)[:, None] != 0, 0.0, h).to(y.dtype.element_ty)
        left = h
        if h_mask is not None:
            left = h * tl.load(h_mask + state, mask=ok, other=0.0)
        z = settled(tl.dot(left, weights, input_precision=PRECISION), BB, BH, WIDTH)
        value, slope = activation(z + x + bias, NONLINEARITY)
        out = value.to(y.dtype.element_ty)
        if flags is not None:
            h = tl.where(pad, h, out)
            out = tl.where(pad, 0.0, out).to(y.dtype.element_ty)
        else:
            h = out
        tl.store(y + own, out, mask=ok)
        if SAVE:
            tl.store(place, slope, mask=tape_ok)
        if PREFETCH:
            x = x_next
        row = after
    tl.store(h_state + state, h, mask=ok)


@triton.jit(do_not_specialize=_RUN_TIME)
def rnn_backward_resident(
    grad_y,
    w_hh,
    tape,
    dsums,
    dh_state,
    flags,
    h_mask,
    T,
    B,
    H: tl.constexpr,
    TAPE_STRIDE: tl.constexpr,
    DSUMS_STRIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As :func:`rnn_backward_spread`."""
    batch = B.to(tl.int64)
    u = tl.arange(0, BH)
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)
    row_ok = b < B
    ok = row_ok[:, None] & (u < H)[None, :]
    state = b[:, None] * H + u[None, :]
    weights = resident_weights(w_hh, H, BH, True)
    dh = tl.load(dh_state + state, mask=ok, other=0.0)
    dh_past = dh
    for n in range(T):
        if REVERSE:
            row = n * batch + b
        else:
            row = (T - 1 - n) * batch + b
        slope = tl.load(tape + row[:, None] * TAPE_STRIDE + u[None, :], mask=ok, other=0.0)
        dy = tl.zeros([BB, BH], dtype=tl.float32)
        if grad_y is not None:
            dy = tl.load(grad_y + row[:, None] * H + u[None, :], mask=ok, other=0.0).to(tl.float32)
        if flags is not None:
            row_flags = tl.load(flags + row, mask=row_ok, other=0).to(tl.int32)
            cut = (row_flags & CUT)[:, None] != 0
            pad = (row_flags & PADDING)[:, None] != 0
            dy = tl.where(pad, 0.0, dy)
        dh += dy
        d = dh * slope
        dh_past = tl.zeros_like(dh)
        if flags is not None:
            d = tl.where(pad, 0.0, d)
            dh_past = tl.where(pad & (cut == 0), dh, 0.0)
        value = d.to(dsums.dtype.element_ty)
        tl.store(dsums + row[:, None] * DSUMS_STRIDE + u[None, :], value, mask=ok)
        dh = settled(tl.dot(value, weights, input_precision=PRECISION), BB, BH, WIDTH)
        if h_mask is not None:
            dh *= tl.load(h_mask + state, mask=ok, other=0.0).to(tl.float32)
        if flags is not None:
            dh = tl.where(cut, 0.0, dh)
        dh += dh_past
    tl.store(dh_state + state, dh_past, mask=ok)


# Launchers.


def _check(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    flags: Tensor | None,
    nonlinearity: str,
    h_mask: Tensor | None,
) -> tuple[int, int, int]:
    """The sizes (T, B, H), with every input found to have the size they say."""
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    steps, batch, inputs = x.shape
    hidden = h0.shape[-1]
    dtype = x.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(
            f"the GPU kernels of rnn serve float32, float16 and bfloat16, not {dtype}; use the reference"
        )
    expect(
        (
            ("h0", h0, (batch, hidden), dtype),
            ("w_ih", w_ih, (hidden, inputs), dtype),
            ("w_hh", w_hh, (hidden, hidden), dtype),
            ("b_ih", b_ih, (hidden,), dtype),
            ("b_hh", b_hh, (hidden,), dtype),
            ("flags", flags, (steps, batch), torch.uint8),
            ("h_mask", h_mask, (batch, hidden), dtype),
        ),
        x.device,
    )
    return steps, batch, hidden


def plan_for(
    steps: int, batch: int, hidden: int, dtype: torch.dtype, device: torch.device, backward: bool
) -> planning.Plan:
    """The plan that a call of this shape takes."""
    shape = planning.Shape(1, backward, steps, batch, hidden, dtype.itemsize)
    return planning.choose(shape, chip_of(device), input_precision(dtype))


def forward_launches(
    plan: planning.Plan,
    tape: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h_state: Tensor,
    y: Tensor,
    save: bool,
    flags: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    h_mask: Tensor | None = None,
) -> Iterator[Launch]:
    """The launches of the recurrence, by a plan. Every tensor is dense but ``tape``, whose rows may lie apart."""
    steps, batch, hidden = y.shape
    common: dict[str, Tensor | int | None] = {
        "tape": tape,
        "w_hh": w_hh,
        "b_ih": b_ih,
        "b_hh": b_hh,
        "h_state": h_state,
        "y": y,
        "flags": flags,
        "h_mask": h_mask,
        "T": steps,
        "B": batch,
    }
    constants = {
        "H": hidden,
        "HP": padded(hidden),
        "TAPE_STRIDE": tape.stride(1),
        "REVERSE": reverse,
        "SAVE": save,
        "NONLINEARITY": nonlinearity,
    }
    if plan.regime == "resident":
        yield Launch(rnn_forward_resident, plan, common, constants | resident_constants(plan, w_hh.dtype))
        return
    common |= {"exchange": new_exchange(h_state, h_mask), "signals": new_signals(plan, y.device)}
    for begin, count in ranges(plan, steps, backward=False):
        arguments = common | {"begin": begin, "count": count}
        yield Launch(rnn_forward_spread, plan, arguments, constants | tile_constants(plan))


def backward_launches(
    plan: planning.Plan,
    grad_y: Tensor | None,
    w_hh: Tensor,
    tape: Tensor,
    dsums: Tensor,
    dh_state: Tensor,
    flags: Tensor | None,
    reverse: bool,
    h_mask: Tensor | None = None,
) -> Iterator[Launch]:
    """The launches of BPTT, by a plan. Every tensor is dense but ``tape`` and ``dsums``, whose rows may lie apart;
    those of ``dsums`` have room for whole loads."""
    steps = tape.shape[0]
    batch, hidden = dh_state.shape
    common: dict[str, Tensor | int | None] = {
        "grad_y": grad_y,
        "w_hh": w_hh,
        "tape": tape,
        "dsums": dsums,
        "dh_state": dh_state,
        "flags": flags,
        "h_mask": h_mask,
        "T": steps,
        "B": batch,
    }
    constants = {
        "H": hidden,
        "TAPE_STRIDE": tape.stride(1),
        "DSUMS_STRIDE": dsums.stride(1),
        "REVERSE": reverse,
    }
    if plan.regime == "resident":
        yield Launch(rnn_backward_resident, plan, common, constants | resident_constants(plan, w_hh.dtype))
        return
    common |= {"signals": new_signals(plan, tape.device)}
    constants["BOUND"] = whole_loads(hidden, dsums.dtype)
    for begin, count in ranges(plan, steps, backward=True):
        arguments = common | {"begin": begin, "count": count}
        yield Launch(rnn_backward_spread, plan, arguments, constants | tile_constants(plan))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def run_forward(*arguments: Any) -> None:
    """The recurrence of a forward in Triton; arguments of :func:`forward_launches` but its plan."""
    y = arguments[5]
    steps, batch, hidden = y.shape
    plan = plan_for(steps, batch, hidden, y.dtype, y.device, backward=False)
    for launch in forward_launches(plan, *arguments):
        launch.run()


def run_backward(*arguments: Any) -> None:
    """The recurrence of a backward in Triton; arguments of :func:`backward_launches` but its plan."""
    _, w_hh, tape, _, dh_state = arguments[:5]
    batch, hidden = dh_state.shape
    plan = plan_for(len(tape), batch, hidden, w_hh.dtype, w_hh.device, backward=True)
    for launch in backward_launches(plan, *arguments):
        launch.run()


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
    h_mask: Tensor | None = None,
    recurrence: Callable[..., None] = run_forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h_n, slopes)``; the tape ``slopes`` is empty unless ``save``. ``h_mask [B, H]`` multiplies h_{t-1} before
    the recurrent product. ``recurrence`` is what walks through time, called like :func:`run_forward`.

    Raises:
        RuntimeError: the dtype is float64.
        ValueError: a tensor has the wrong size, dtype or device.
    """
    steps, batch, hidden = _check(x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity, h_mask)
    width = padded(hidden)
    with kernel_context(x):
        y = x.new_empty((steps, batch, hidden))
        slopes = x.new_empty(slopes_shape(steps, batch, hidden), dtype=torch.float32)
        h_n = h0.clone(memory_format=torch.contiguous_format)
        if batch:
            # One product for all steps, straight into the tape.
            columns = slopes.flatten(0, 1)[:, :width]
            wide_product(x.flatten(0, 1), padded_gates(w_ih, 1, width).t(), columns)
            recurrence(
                slopes,
                w_hh.contiguous(),
                _dense(b_ih),
                _dense(b_hh),
                h_n,
                y,
                save != 0,
                _dense(flags),
                nonlinearity,
                reverse,
                _dense(h_mask),
            )
        return y, h_n, slopes if save else slopes.new_empty(0)


def _backward(
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
    h_mask: Tensor | None = None,
    overwrite: bool = False,
    recurrence: Callable[..., None] = run_backward,
) -> tuple[Tensor, ...]:
    """``(dx, dh0, dw_ih, dw_hh, db, dh_mask)``, empty where ``needs`` does not ask.

    ``overwrite`` lets the gradients of the sums take the place of the slopes; half types keep them apart, in half type.
    ``recurrence`` is called like :func:`run_backward`, other arguments as of :func:`rnn_fwd`.
    """
    steps, batch, hidden = _check(x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity, h_mask)
    expect(
        (
            ("grad_y", grad_y, (steps, batch, hidden), x.dtype),
            ("grad_h_n", grad_h_n, (batch, hidden), x.dtype),
            ("y", y, (steps, batch, hidden), x.dtype),
            ("slopes", slopes, slopes_shape(steps, batch, hidden), torch.float32),
        ),
        x.device,
    )
    with kernel_context(x):
        none = x.new_empty(0)
        slopes, w_hh = slopes.contiguous(), w_hh.contiguous()
        in_place = overwrite and x.dtype == torch.float32
        dsums = slopes if in_place else x.new_empty((steps, batch, padded(hidden)))
        dh0 = wide_state(grad_h_n, h0)
        if batch:
            recurrence(_dense(grad_y), w_hh, slopes, dsums, dh0, _dense(flags), reverse, _dense(h_mask))
        rows = dsums.flatten(0, 1)[:, :hidden]
        dx = product(rows, w_ih).view(x.shape) if needs & NEEDS_X else none
        if needs & NEEDS_STATE:
            first = steps - 1 if reverse else 0
            arriving = wide_product(dsums[first, :, :hidden], w_hh)
            if h_mask is not None:
                arriving = arriving * h_mask
            if flags is not None:
                arriving = arriving.masked_fill((flags[first] & 1).bool().unsqueeze(1), 0.0)
            dh0 = (dh0 + arriving).to(x.dtype)
        else:
            dh0 = none
        dw_ih = dw_hh = db = none
        if needs & NEEDS_WEIGHTS:
            dw_ih = weight_gradient(rows, x)
            dw_hh = weight_gradient(rows, previous_states(y, h0, flags, reverse, h_mask))
            if b_ih is not None or b_hh is not None:
                db = rows.sum(0, dtype=torch.float32).to(x.dtype)
        dh_mask = none
        if h_mask is not None and needs & NEEDS_MASK:
            dh_mask = mask_gradient(rows, w_hh, previous_states(y, h0, flags, reverse))
        return dx, dh0, dw_ih, dw_hh, db, dh_mask


def rnn_bwd(*args: Any, overwrite: bool = False, recurrence: Callable[..., None] = run_backward) -> tuple[Tensor, ...]:
    """``(dx, dh0, dw_ih, dw_hh, db)``; arguments as of :func:`_backward`, without options."""
    return _backward(*args, overwrite=overwrite, recurrence=recurrence)[:5]


def rnn_bwd_(*args: Any, recurrence: Callable[..., None] = run_backward) -> tuple[Tensor, ...]:
    """:func:`rnn_bwd`, free to overwrite the slopes (the argument at place 10)."""
    torch.autograd.graph.increment_version(args[10])
    return rnn_bwd(*args, overwrite=True, recurrence=recurrence)


# The operation with options, of which fastseq.ops.dispatch.SERVED names those that a call may use here; the other
# arguments can be left out.


def rnn_options_fwd(*args: Any, recurrence: Callable[..., None] = run_forward) -> tuple[Tensor, ...]:
    """:func:`rnn_fwd` for a call of ``fastseq::rnn_options_fwd``."""
    given: Any = (*args[:7], *args[9:11], args[-1])
    return rnn_fwd(*given, h_mask=args[8], recurrence=recurrence)


def rnn_options_bwd(
    *args: Any, overwrite: bool = False, recurrence: Callable[..., None] = run_backward
) -> tuple[Tensor, ...]:
    """Its backward; the gradient of the reset state, which is not served, is empty."""
    given: Any = (*args[:9], *args[11:15], args[-1])
    *plain, dh_mask = _backward(*given, h_mask=args[10], overwrite=overwrite, recurrence=recurrence)
    return (*plain, dh_mask.new_empty(0), dh_mask)


def rnn_options_bwd_(*args: Any, recurrence: Callable[..., None] = run_backward) -> tuple[Tensor, ...]:
    """:func:`rnn_options_bwd`, free to overwrite the slopes (the argument at place 12)."""
    torch.autograd.graph.increment_version(args[12])
    return rnn_options_bwd(*args, overwrite=True, recurrence=recurrence)
