"""The LSTM by the CUDA kernels: one layer in one direction. What surrounds the recurrence, the products over all steps,
is :mod:`fastseq.kernels.lstm`'s; shapes and conventions are those of its launches."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.cpu.memory import STORAGE, address
from fastseq.cuda import plan as planning
from fastseq.cuda.extension import extension
from fastseq.cuda.steps import first_operand, in_time, row, stream_of
from fastseq.kernels.launch import new_exchange
from fastseq.kernels.products import wide_product


def run_forward(
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
    *options: Tensor | None,
) -> None:
    """The recurrence of a forward. Arguments as of :func:`fastseq.kernels.lstm.run_forward`."""
    _refuse(options)
    steps, batch, hidden = y.shape
    plan = planning.choose(steps, batch, hidden, y.dtype, y.device, False, flags is not None)
    code, stride, stream = STORAGE[y.dtype], gates.stride(1), stream_of(y)
    # What both forms for all steps take, between how they are cut and what is theirs alone.
    whole = (
        (steps, batch, hidden),
        reverse,
        c is not None,
        address(gates),
        stride,
        *(address(value) for value in (w_hh, b_ih, b_hh, h_state, c_state, y, c, flags)),
    )
    if plan.regime == "cluster":
        extension().lstm_cluster_forward(code, plan.build, plan.clusters, *whole, stream)
        return
    operand, next_operand = first_operand(h_state, flags, steps - 1 if reverse else 0)
    if plan.regime == "grid":
        exchange, signals = new_exchange(operand, None), new_signals(plan, y.device)
        extension().lstm_grid_forward(code, plan.build, *whole, address(exchange), address(signals), stream)
        return
    weights = w_hh.t()
    for t, after in in_time(steps, reverse):
        product = wide_product(operand, weights)
        extension().lstm_cell_forward(
            code,
            (batch, hidden),
            row(gates, t),
            stride,
            *(address(value) for value in (product, b_ih, b_hh, h_state, c_state)),
            next_operand,
            *(row(value, t) for value in (y, c, flags)),
            row(flags, after),
            stream,
        )


def run_backward(
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
    *options: Tensor | None,
) -> None:
    """The recurrence of a backward. Arguments as of :func:`fastseq.kernels.lstm.run_backward`."""
    _refuse(options)
    steps = len(c)
    batch, hidden = c0.shape
    plan = planning.choose(steps, batch, hidden, c0.dtype, c0.device, True, flags is not None)
    code, stream = STORAGE[c0.dtype], stream_of(c0)
    stride, dgates_stride = gates.stride(1), dgates.stride(1)
    whole = (
        (steps, batch, hidden),
        reverse,
        *(address(value) for value in (grad_y, w_hh, gates)),
        stride,
        *(address(value) for value in (c, c0, dgates)),
        dgates_stride,
        *(address(value) for value in (dh_state, dc_state, flags)),
    )
    if plan.regime == "cluster":
        extension().lstm_cluster_backward(code, plan.build, plan.clusters, *whole, stream)
        return
    if plan.regime == "grid":
        signals = new_signals(plan, c0.device)
        extension().lstm_grid_backward(code, plan.build, *whole, address(signals), stream)
        return
    # Backwards in time: the step that comes next here is the one before in the direction.
    product = None
    done = None
    for t, before in in_time(steps, not reverse):
        if done is not None:
            product = wide_product(dgates[done, :, : 4 * hidden], w_hh)
        extension().lstm_cell_backward(
            code,
            (batch, hidden),
            row(grad_y, t),
            address(product),
            row(gates, t),
            stride,
            row(c, before),
            address(c0),
            row(dgates, t),
            dgates_stride,
            *(address(value) for value in (dh_state, dc_state)),
            row(flags, t),
            row(flags, done),
            stream,
        )
        done = t


def new_signals(plan: planning.Plan, device: torch.device) -> Tensor:
    """The signals of a launch of the grid, at zero. A call has its own, so calls on several streams do not meet."""
    return torch.zeros(plan.blocks, dtype=torch.int32, device=device)


def _refuse(options: tuple[Tensor | None, ...]) -> None:
    """What :data:`fastseq.ops.dispatch.SERVED` does not name does not come here but through ``torch.ops``."""
    if any(option is not None for option in options):
        raise RuntimeError("the CUDA kernels of lstm serve no masks, zoneout or peepholes; use the reference")
