"""The operation lstm, one layer in one direction over the whole sequence: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.lstm` (every device) and :mod:`fastseq.cpu.lstm` (C++);
``torch.ops.fastseq.lstm_fwd`` and ``lstm_bwd`` are the ops beneath. The caller of ``lstm_fwd`` need not know whether a
gradient will be wanted: the kernel at the ``Autograd`` key does, and keeps a tape of its own then.
"""

from __future__ import annotations

from torch import Tensor

from fastseq.cpu import lstm as kernels
from fastseq.ops.checks import autocast_dtype, check_kinds, check_shapes, check_time, refuse_shape, under_autocast
from fastseq.ops.flags import step_flags
from fastseq.ops.needs import NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.operation import NO_BATCH, Operand, Operation, Result
from fastseq.ops.tape import accumulate_dtype, tape_shapes
from fastseq.reference.lstm import lstm_bwd as reference_bwd
from fastseq.reference.lstm import lstm_fwd as reference_fwd

_OPTIONAL = frozenset(("b_ih", "b_hh", "w_hr"))


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
    """One LSTM layer in one direction over a whole sequence (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

    With ``z = w_ih x_t + b_ih + w_hh h_{t-1} + b_hh`` split into four in PyTorch's gate order i, f, g, o:
    ``c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)`` and ``h_t = sigmoid(o) tanh(c_t)``, or ``w_hr`` times that with a
    projection (Sak et al. 2014). T steps, B sequences, I inputs, H hidden units, P outputs (P = H without ``w_hr``).
    All floating tensors share one dtype (float32, float64, bfloat16, float16) and one device, and may have any strides.

    Args:
        x: input, ``[T, B, I]``, T at least 1.
        h0: hidden state before the first step processed, ``[B, P]``.
        c0: cell state before the first step processed, ``[B, H]``.
        w_ih: input weights, ``[4H, I]``.
        w_hh: recurrent weights, ``[4H, P]``.
        b_ih: input bias, ``[4H]``, or None.
        b_hh: recurrent bias, ``[4H]``, or None.
        w_hr: projection, ``[P, H]``, or None.
        reverse: process the steps from the last to the first. Results keep the order of the input.
        lengths: integers ``[B]`` on any device, from 0 to T, in any order: sequence b ends after ``lengths[b]`` steps.
            Its output is zero from there on, and its final state is that of its last valid step.
        reset: bool ``[T, B]``: where true, a new episode starts at step t. No state and no gradient crosses between t
            and t - 1, in either direction; the episode starts from the zero state.

    Returns:
        ``y [T, B, P]``, ``h_n [B, P]``, ``c_n [B, H]`` in the dtype of ``x``; the states are those after the last step
        processed. Under autocast the dtype is autocast's, as for ``torch.nn.LSTM``.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype or device.
        fastseq.ShapeError: an argument has the wrong rank or size, T or H is 0, or a length is out of range.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = (
            under_autocast(value, dtype) for value in (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        )
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    flags = None
    if lengths is not None or reset is not None:
        check_time(lengths, reset, x.shape[0], x.shape[1])
        flags = step_flags(lengths, reset, x.shape[0], x.shape[1], reverse, x.device)
    y, h_n, c_n, _c, _gates = _fwd(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags, reverse, False)
    return y, h_n, c_n


def _check(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> None:
    check_kinds(
        (
            ("x", x),
            ("h0", h0),
            ("c0", c0),
            ("w_ih", w_ih),
            ("w_hh", w_hh),
            ("b_ih", b_ih),
            ("b_hh", b_hh),
            ("w_hr", w_hr),
        ),
        optional=_OPTIONAL,
    )
    if x.dim() != 3:
        refuse_shape("x", "shape [T, B, I]", x.shape)
    if w_ih.dim() != 2 or w_ih.shape[0] == 0 or w_ih.shape[0] % 4:
        refuse_shape("w_ih", "shape [4H, I] with a hidden size H of at least 1", w_ih.shape)
    if w_hr is not None and (w_hr.dim() != 2 or w_hr.shape[0] == 0):
        refuse_shape("w_hr", "shape [P, H] with P of at least 1", w_hr.shape)
    steps, batch, inputs = x.shape
    if steps == 0:
        refuse_shape("x", "sequence length to be larger than 0 in RNN (x is [T, B, I])", x.shape)
    rows = w_ih.shape[0]
    hidden = rows // 4
    outputs = hidden if w_hr is None else w_hr.shape[0]
    check_shapes(
        (
            ("w_ih", w_ih, (rows, inputs), "[4H, I]"),
            ("w_hr", w_hr, (outputs, hidden), "[P, H]"),
            ("w_hh", w_hh, (rows, outputs), "[4H, P]"),
            ("b_ih", b_ih, (rows,), "[4H]"),
            ("b_hh", b_hh, (rows,), "[4H]"),
            ("h0", h0, (batch, outputs), "[B, P]"),
            ("c0", c0, (batch, hidden), "[B, H]"),
        )
    )


def _fake_fwd(
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
) -> tuple[Tensor, ...]:
    steps, batch, hidden = x.shape[0], x.shape[1], w_hh.shape[0] // 4
    outputs = h0.shape[1]
    c_shape, gates_shape = tape_shapes(steps, batch, hidden) if save else ((0,), (0,))
    wide = accumulate_dtype(x.dtype)
    return (
        x.new_empty((steps, batch, outputs)),
        x.new_empty((batch, outputs)),
        x.new_empty((batch, hidden)),
        x.new_empty(c_shape, dtype=wide),
        x.new_empty(gates_shape, dtype=wide),
    )


_OP = Operation(
    "lstm",
    inputs=(
        Operand("x", 1, NEEDS_X),
        Operand("h0", 0, NEEDS_STATE),
        Operand("c0", 0, NEEDS_STATE),
        Operand("w_ih", NO_BATCH, NEEDS_WEIGHTS),
        Operand("w_hh", NO_BATCH, NEEDS_WEIGHTS),
        Operand("b_ih", NO_BATCH, NEEDS_WEIGHTS, optional=True),
        Operand("b_hh", NO_BATCH, NEEDS_WEIGHTS, optional=True, shares=True),
        Operand("w_hr", NO_BATCH, NEEDS_WEIGHTS, optional=True),
        Operand("flags", 1, optional=True),
    ),
    settings=("bool reverse",),
    outputs=(Result("y", 1), Result("h_n", 0), Result("c_n", 0)),
    tape=(Result("c", 1), Result("gates", 1)),
    fake=_fake_fwd,
    reference=(reference_fwd, reference_bwd),
    cpp=(kernels.lstm_fwd, kernels.lstm_bwd),
)
_fwd = _OP.fwd
