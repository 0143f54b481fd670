"""The operation rnn, one Elman layer in one direction over the whole sequence: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.rnn` (every device) and :mod:`fastseq.cpu.rnn` (C++);
``torch.ops.fastseq.rnn_fwd`` and ``rnn_bwd`` are the ops beneath. Beside ``y`` the tape holds the slope of the
nonlinearity at every step (see :mod:`fastseq.ops.tape`).
"""

from __future__ import annotations

from torch import Tensor

from fastseq.cpu import rnn as kernels
from fastseq.ops.checks import autocast_dtype, check_kinds, check_shapes, check_time, refuse_shape, under_autocast
from fastseq.ops.flags import step_flags
from fastseq.ops.needs import NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.operation import NO_BATCH, Operand, Operation, Result
from fastseq.ops.tape import accumulate_dtype, slopes_shape
from fastseq.reference.rnn import NONLINEARITIES
from fastseq.reference.rnn import rnn_bwd as reference_bwd
from fastseq.reference.rnn import rnn_fwd as reference_fwd

_OPTIONAL = frozenset(("b_ih", "b_hh"))


def rnn(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One Elman layer in one direction over a whole sequence (Elman 1990).

    ``h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh)``. T steps, B sequences, I inputs, H hidden units. All floating
    tensors share one dtype (float32, float64, bfloat16, float16) and one device, and may have any strides.

    Args:
        x: input, ``[T, B, I]``, T at least 1.
        h0: hidden state before the first step processed, ``[B, H]``.
        w_ih: input weights, ``[H, I]``.
        w_hh: recurrent weights, ``[H, H]``.
        b_ih: input bias, ``[H]``, or None.
        b_hh: recurrent bias, ``[H]``, or None.
        nonlinearity: f: ``"tanh"``, ``"relu"`` or ``"sigmoid"`` (the logistic function).
        reverse: process the steps from the last to the first. Results keep the order of the input.
        lengths: integers ``[B]`` on any device, from 0 to T, in any order: sequence b ends after ``lengths[b]`` steps.
            Its output is zero from there on, and its final state is that of its last valid step.
        reset: bool ``[T, B]``: where true, a new episode starts at step t. No state and no gradient crosses between t
            and t - 1, in either direction; the episode starts from the zero state.

    Returns:
        ``y [T, B, H]`` and ``h_n [B, H]`` in the dtype of ``x``; the state is that after the last step processed. Under
        autocast the dtype is autocast's, as for ``torch.nn.RNN``.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype or device.
        ValueError: there is no such nonlinearity.
        fastseq.ShapeError: an argument has the wrong rank or size, T or H is 0, or a length is out of range.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, h0, w_ih, w_hh, b_ih, b_hh = (under_autocast(value, dtype) for value in (x, h0, w_ih, w_hh, b_ih, b_hh))
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    _check(x, h0, w_ih, w_hh, b_ih, b_hh)
    flags = None
    if lengths is not None or reset is not None:
        check_time(lengths, reset, x.shape[0], x.shape[1])
        flags = step_flags(lengths, reset, x.shape[0], x.shape[1], reverse, x.device)
    y, h_n, _slopes = _fwd(x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity, reverse, False)
    return y, h_n


def _check(x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> None:
    check_kinds(
        (("x", x), ("h0", h0), ("w_ih", w_ih), ("w_hh", w_hh), ("b_ih", b_ih), ("b_hh", b_hh)),
        optional=_OPTIONAL,
    )
    if x.dim() != 3:
        refuse_shape("x", "shape [T, B, I]", x.shape)
    if w_ih.dim() != 2 or w_ih.shape[0] == 0:
        refuse_shape("w_ih", "shape [H, I] with a hidden size H of at least 1", w_ih.shape)
    steps, batch, inputs = x.shape
    if steps == 0:
        refuse_shape("x", "sequence length to be larger than 0 in RNN (x is [T, B, I])", x.shape)
    hidden = w_ih.shape[0]
    check_shapes(
        (
            ("w_ih", w_ih, (hidden, inputs), "[H, I]"),
            ("w_hh", w_hh, (hidden, hidden), "[H, H]"),
            ("b_ih", b_ih, (hidden,), "[H]"),
            ("b_hh", b_hh, (hidden,), "[H]"),
            ("h0", h0, (batch, hidden), "[B, H]"),
        )
    )


def _fake_fwd(
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
    steps, batch, hidden = x.shape[0], x.shape[1], h0.shape[1]
    shape = slopes_shape(steps, batch, hidden) if save else (0,)
    slopes = x.new_empty(shape, dtype=accumulate_dtype(x.dtype))
    return x.new_empty((steps, batch, hidden)), x.new_empty(h0.shape), slopes


_OP = Operation(
    "rnn",
    inputs=(
        Operand("x", 1, NEEDS_X),
        Operand("h0", 0, NEEDS_STATE),
        Operand("w_ih", NO_BATCH, NEEDS_WEIGHTS),
        Operand("w_hh", NO_BATCH, NEEDS_WEIGHTS),
        Operand("b_ih", NO_BATCH, NEEDS_WEIGHTS, optional=True),
        Operand("b_hh", NO_BATCH, NEEDS_WEIGHTS, optional=True, shares=True),
        Operand("flags", 1, optional=True),
    ),
    settings=("str nonlinearity", "bool reverse"),
    outputs=(Result("y", 1), Result("h_n", 0)),
    tape=(Result("slopes", 1),),
    fake=_fake_fwd,
    reference=(reference_fwd, reference_bwd),
    cpp=(kernels.rnn_fwd, kernels.rnn_bwd),
)
_fwd = _OP.fwd
