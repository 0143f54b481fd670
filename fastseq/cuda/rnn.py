"""The Elman layer by the CUDA kernels, in the regime ``cell``: one product and one fused kernel per step. What
surrounds the recurrence is :mod:`fastseq.kernels.rnn`'s; shapes and conventions are those of its launches."""

from __future__ import annotations

from torch import Tensor

from fastseq.cpu.memory import STORAGE, address
from fastseq.cpu.rnn import ACTIVATIONS
from fastseq.cuda.extension import extension
from fastseq.cuda.steps import first_operand, in_time, row, stream_of
from fastseq.kernels.products import wide_product


def run_forward(
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
) -> None:
    """The recurrence of a forward. Arguments as of :func:`fastseq.kernels.rnn.run_forward`."""
    _refuse(h_mask)
    steps, batch, hidden = y.shape
    operand, next_operand = first_operand(h_state, flags, steps - 1 if reverse else 0)
    weights, stream = w_hh.t(), stream_of(y)
    for t, after in in_time(steps, reverse):
        product = wide_product(operand, weights)
        extension().rnn_cell_forward(
            STORAGE[y.dtype],
            ACTIVATIONS[nonlinearity],
            (batch, hidden),
            save,
            row(tape, t),
            tape.stride(1),
            *(address(value) for value in (product, b_ih, b_hh, h_state)),
            next_operand,
            row(y, t),
            row(flags, t),
            row(flags, after),
            stream,
        )


def run_backward(
    grad_y: Tensor | None,
    w_hh: Tensor,
    tape: Tensor,
    dsums: Tensor,
    dh_state: Tensor,
    flags: Tensor | None,
    reverse: bool,
    h_mask: Tensor | None = None,
) -> None:
    """The recurrence of a backward. Arguments as of :func:`fastseq.kernels.rnn.run_backward`."""
    _refuse(h_mask)
    batch, hidden = dh_state.shape
    stream = stream_of(dh_state)
    product = None
    done = None
    for t, _ in in_time(len(tape), not reverse):
        if done is not None:
            product = wide_product(dsums[done, :, :hidden], w_hh)
        extension().rnn_cell_backward(
            STORAGE[w_hh.dtype],
            (batch, hidden),
            row(grad_y, t),
            address(product),
            row(tape, t),
            tape.stride(1),
            row(dsums, t),
            dsums.stride(1),
            address(dh_state),
            row(flags, t),
            row(flags, done),
            stream,
        )
        done = t


def _refuse(h_mask: Tensor | None) -> None:
    """What :data:`fastseq.ops.dispatch.SERVED` does not name does not come here but through ``torch.ops``."""
    if h_mask is not None:
        raise RuntimeError("the CUDA kernels of rnn serve no mask on h; use the reference")
