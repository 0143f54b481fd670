"""The operation rnn, one Elman layer in one direction over the whole sequence: checks, schemas and fakes.

As :mod:`fastseq.ops.lstm` it is two operations, ``rnn`` and ``rnn_options``. The kernels are
:mod:`fastseq.reference.rnn` (every device) and :mod:`fastseq.cpu.rnn` (C++). Beside ``y`` the tape holds
the slope of the nonlinearity at every step (see :mod:`fastseq.ops.tape`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq.cpu import rnn as kernels
from fastseq.ops.checks import (
    autocast_dtype,
    check_kinds,
    check_limits,
    check_reset_state,
    check_shapes,
    refuse_shape,
    under_autocast,
)
from fastseq.ops.flags import checked_flags
from fastseq.ops.needs import NEEDS_MASK, NEEDS_RESET, NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.operation import NO_BATCH, Operand, Operation, Result
from fastseq.ops.tape import accumulate_dtype, slopes_shape
from fastseq.reference.rnn import NONLINEARITIES
from fastseq.reference.rnn import rnn_bwd as reference_bwd
from fastseq.reference.rnn import rnn_fwd as reference_fwd
from fastseq.reference.rnn import rnn_options_bwd as reference_options_bwd
from fastseq.reference.rnn import rnn_options_fwd as reference_options_fwd

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
    reset_state: Tensor | None = None,
    h_mask: Tensor | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
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
            and t - 1, in either direction.
        reset_state: h that an episode starts from, ``[B, H]``, or ``[T, B, H]``: row t is what step t takes when it is
            the one that starts (in reverse the step before the one where ``reset`` is true). Zeros if None. It
            receives gradients.
        h_mask: ``[B, H]``, multiplies ``h_{t-1}`` before the recurrent product at every step: recurrent dropout, scaled
            by the caller.
        grad_clip: dL/dh_t is clipped elementwise to ±grad_clip at every step of the backward.
        recompute: keep no slopes for the backward but make them again.

    Returns:
        ``y [T, B, H]`` and ``h_n [B, H]`` in the dtype of ``x``; the state is that after the last step processed. Under
        autocast the dtype is autocast's, as for ``torch.nn.RNN``.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype or device.
        ValueError: there is no such nonlinearity, a number is out of range, or ``reset_state`` comes without ``reset``.
        fastseq.ShapeError: an argument has the wrong rank or size, T or H is 0, or a length is out of range.
    """
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    flags = None
    if lengths is not None or reset is not None:
        flags = checked_flags(x, lengths, reset, reverse)
    if reset_state is not None and reset is None:
        raise ValueError("reset_state: expected None without reset: there is no step that would take it")
    options = reset_state, h_mask, grad_clip, recompute
    return layer(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, flags, reverse, *options)


def layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str,
    flags: Tensor | None,
    reverse: bool,
    reset_state: Tensor | None = None,
    h_mask: Tensor | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`rnn` with step flags for its direction instead of ``lengths`` and ``reset``."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, h0, w_ih, w_hh, b_ih, b_hh, reset_state, h_mask = (
            under_autocast(value, dtype) for value in (x, h0, w_ih, w_hh, b_ih, b_hh, reset_state, h_mask)
        )
    _check(x, h0, w_ih, w_hh, b_ih, b_hh)
    if reset_state is None and h_mask is None and grad_clip is None and not recompute:
        y, h_n = _rnn.call(x, h0, w_ih, w_hh, b_ih, b_hh, flags, nonlinearity, reverse, 0)
        return y, h_n
    steps, batch, hidden = x.shape[0], x.shape[1], h0.shape[1]
    check_kinds((("x", x), ("h_mask", h_mask), ("reset_state", reset_state)), frozenset(("h_mask", "reset_state")))
    check_shapes((("h_mask", h_mask, (batch, hidden), "[B, H]"),))
    if reset_state is not None:
        check_reset_state((("reset_state", reset_state, hidden, "H"),), steps, batch)
        reset_state = reset_state if reset_state.dim() == 3 else reset_state.unsqueeze(0)
    check_limits((("grad_clip", grad_clip),))
    settings = nonlinearity, reverse, grad_clip, recompute
    y, h_n, _slopes = _options_fwd(x, h0, w_ih, w_hh, b_ih, b_hh, flags, reset_state, h_mask, *settings, 0)
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
    save: int,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, hidden = x.shape[0], x.shape[1], h0.shape[1]
    shape = slopes_shape(steps, batch, hidden) if save else (0,)
    slopes = x.new_empty(shape, dtype=accumulate_dtype(x.dtype))
    return x.new_empty((steps, batch, hidden)), x.new_empty(h0.shape), slopes


def _fake_options_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, nonlinearity, reverse, _grad_clip, recompute, save = args
    given: Any = (*args[: len(_INPUTS)], nonlinearity, reverse, save and not recompute)
    return _fake_fwd(*given)


_INPUTS = (
    Operand("x", 1, NEEDS_X),
    Operand("h0", 0, NEEDS_STATE),
    Operand("w_ih", NO_BATCH, NEEDS_WEIGHTS),
    Operand("w_hh", NO_BATCH, NEEDS_WEIGHTS),
    Operand("b_ih", NO_BATCH, NEEDS_WEIGHTS, optional=True),
    Operand("b_hh", NO_BATCH, NEEDS_WEIGHTS, optional=True, shares=True),
    Operand("flags", 1, optional=True),
)
_OUTPUTS = Result("y", 1), Result("h_n", 0)
_TAPE = (Result("slopes", 1),)

_rnn = Operation(
    "rnn",
    inputs=_INPUTS,
    settings=("str nonlinearity", "bool reverse"),
    outputs=_OUTPUTS,
    tape=_TAPE,
    fake=_fake_fwd,
    reference=(reference_fwd, reference_bwd),
    cpp=(kernels.rnn_fwd, kernels.rnn_bwd),
)


def _used(tensors: Any, settings: Any, with_backward: bool) -> list[str]:
    """The options that a call uses, from its tensors beyond the plain ones and its settings."""
    h_reset, h_mask = tensors
    *_, grad_clip, recompute = settings
    uses = {
        "reset_state": h_reset is not None,
        "h_mask": h_mask is not None,
        "grad_clip": with_backward and grad_clip is not None,
        "recompute": with_backward and recompute,
    }
    return [option for option, used in uses.items() if used]


def _used_by_fwd(*args: Any) -> list[str]:
    return _used(args[len(_INPUTS) : len(_INPUTS) + 2], args[-3:-1], with_backward=args[-1])


def _used_by_bwd(*args: Any) -> list[str]:
    first = len(_OUTPUTS) + len(_INPUTS)
    return _used(args[first : first + 2], args[-3:-1], with_backward=True)


_options_fwd = Operation(
    "rnn_options",
    inputs=(
        *_INPUTS,
        Operand("h_reset", 1, NEEDS_RESET, optional=True),  # [1 or T, B, H]
        Operand("h_mask", 0, NEEDS_MASK, optional=True),
    ),
    settings=("str nonlinearity", "bool reverse", "float? grad_clip", "bool recompute"),
    outputs=_OUTPUTS,
    tape=_TAPE,
    fake=_fake_options_fwd,
    reference=(reference_options_fwd, reference_options_bwd),
    cpp=(kernels.rnn_options_fwd, kernels.rnn_options_bwd),
    options_of="rnn",
    options_used=(_used_by_fwd, _used_by_bwd),
).fwd
