"""The operation lstm, one layer in one direction over the whole sequence: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.lstm` (every device) and :mod:`fastseq.cpu.lstm` (C++);
``torch.ops.fastseq.lstm_fwd`` and ``lstm_bwd`` are the ops beneath. The caller of ``lstm_fwd`` need not know whether a
gradient will be wanted: the kernel at the ``Autograd`` key does, and keeps a tape of its own then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu import lstm as kernels
from fastseq.ops import transforms
from fastseq.ops.checks import autocast_dtype, check_kinds, check_shapes, check_time, refuse_shape, under_autocast
from fastseq.ops.dispatch import library, register_kernels
from fastseq.ops.flags import step_flags
from fastseq.ops.needs import NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.tape import accumulate_dtype, tape_shapes
from fastseq.reference.common import gradients
from fastseq.reference.lstm import lstm_bwd as reference_bwd
from fastseq.reference.lstm import lstm_fwd as reference_fwd

_INPUTS = (
    "Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? flags"
)
_GRADS = "Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n"
_RESULTS = "(Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor dw_hr)"
_TAGS = (torch.Tag.pt2_compliant_tag,)

library.define(
    f"lstm_fwd({_INPUTS}, bool reverse, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)",
    tags=_TAGS,
)
library.define(
    f"lstm_bwd({_GRADS}, {_INPUTS}, Tensor y, Tensor c, Tensor gates, bool reverse, int needs) -> {_RESULTS}",
    tags=_TAGS,
)
# The same, but free to overwrite the gates with their gradients: for eager mode, when the graph is not kept.
library.define(
    f"lstm_bwd_({_GRADS}, {_INPUTS}, Tensor y, Tensor c, Tensor(a!) gates, bool reverse, int needs) -> {_RESULTS}",
    tags=_TAGS,
)

_fwd = torch.ops.fastseq.lstm_fwd.default
_bwd = torch.ops.fastseq.lstm_bwd.default
_bwd_ = torch.ops.fastseq.lstm_bwd_.default


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
        optional=frozenset(("b_ih", "b_hh", "w_hr")),
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


# The kernels.


def _overwriting_bwd(*args: Any) -> tuple[Tensor, ...]:
    torch.autograd.graph.increment_version(args[14])
    return kernels.lstm_bwd(*args, overwrite=True)


register_kernels("lstm_fwd", reference_fwd, kernels.lstm_fwd)
register_kernels("lstm_bwd", reference_bwd, kernels.lstm_bwd)
register_kernels("lstm_bwd_", reference_bwd, _overwriting_bwd)


# Shapes without data, for torch.compile and torch.export.


@torch.library.register_fake("fastseq::lstm_fwd", lib=library)
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


def _fake_bwd(
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
) -> tuple[Tensor, ...]:
    bias = b_hh if b_ih is None else b_ih
    state, weights = needs & NEEDS_STATE, needs & NEEDS_WEIGHTS
    asked = (needs & NEEDS_X, state, state, weights, weights, weights, weights)
    inputs = (x, h0, c0, w_ih, w_hh, bias, w_hr)
    return tuple(
        x.new_empty(value.shape) if need and value is not None else x.new_empty(0)
        for need, value in zip(asked, inputs, strict=True)
    )


torch.library.register_fake("fastseq::lstm_bwd", _fake_bwd, lib=library)
torch.library.register_fake("fastseq::lstm_bwd_", _fake_bwd, lib=library)


# Autograd.


class LSTM(transforms.Function):
    """``lstm_fwd`` with its backward. When the caller did not ask for the tape, it keeps one that nobody else sees."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        *inputs, reverse, save = args
        y, h_n, c_n, c, gates = transforms.redispatch(_fwd, keyset, *inputs, reverse, True)
        ctx.save_for_backward(*inputs, y, c, gates)
        ctx.reverse = reverse
        ctx.private = not save
        ctx.set_materialize_grads(False)
        if not save:
            c, gates = c.new_empty(0), gates.new_empty(0)
        ctx.mark_non_differentiable(c, gates)
        return y, h_n, c_n, c, gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_h_n, grad_c_n = grads[:3]
        _, need_x, need_h0, need_c0, *need_weights = ctx.needs_input_grad[:9]
        nothing = (None,) * 12
        if grad_y is None and grad_h_n is None and grad_c_n is None:
            return nothing
        needs = NEEDS_X * need_x | NEEDS_STATE * (need_h0 or need_c0) | NEEDS_WEIGHTS * any(need_weights)
        saved = ctx.saved_tensors
        bwd = _bwd_ if ctx.private and transforms.may_overwrite_tape(saved[-1], grad_y, grad_h_n, grad_c_n) else _bwd
        dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr = bwd(grad_y, grad_h_n, grad_c_n, *saved, ctx.reverse, needs)
        need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = need_weights
        return (
            None,
            dx if need_x else None,
            dh0 if need_h0 else None,
            dc0 if need_c0 else None,
            dw_ih if need_w_ih else None,
            dw_hh if need_w_hh else None,
            db if need_b_ih else None,
            # Not the same tensor twice, or whoever scales one gradient in place would scale both.
            (db.clone() if need_b_ih else db) if need_b_hh else None,
            dw_hr if need_w_hr else None,
            None,
            None,
            None,
        )


class LSTMBackward(transforms.Function):
    """``lstm_bwd`` with its own backward: second derivatives go through the reference, whatever kernel served."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = transforms.redispatch(_bwd, keyset, *args)
        ctx.save_for_backward(*args[:12])  # grad_y … flags: y and the tape are functions of these
        ctx.reverse, ctx.needs = args[15:]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, flags = ctx.saved_tensors
        asked = ctx.needs_input_grad[1:12]

        def bwd(*inputs: Any) -> tuple[Tensor, ...]:
            unused = inputs[3]  # for y, c and gates
            args = [*inputs, flags, unused, unused, unused, ctx.reverse, ctx.needs]
            return reference_bwd(*args, differentiable=True)

        results = gradients(bwd, inputs, asked, grads, differentiable=True)
        return (None, *(grad if need else None for grad, need in zip(results, asked, strict=True)), *(None,) * 6)


def _autograd_fwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("lstm_fwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(LSTM, keyset, *args)  # type: ignore[no-any-return]
    return _fwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


def _autograd_bwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("lstm_bwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(LSTMBackward, keyset, *args)  # type: ignore[no-any-return]
    return _bwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


def _autograd_bwd_(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        raise RuntimeError("fastseq::lstm_bwd_ has no derivative: it overwrites its tape; use fastseq::lstm_bwd")
    return _bwd_.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


library.impl("lstm_fwd", _autograd_fwd, "Autograd", with_keyset=True)
library.impl("lstm_bwd", _autograd_bwd, "Autograd", with_keyset=True)
library.impl("lstm_bwd_", _autograd_bwd_, "Autograd", with_keyset=True)


# vmap: the mapped dimension becomes part of the batch, unless weights or their gradients differ along it.

# The batch dimension of each tensor, in the order of the schemas; -1: a weight, which has none.
_BATCH_INPUTS = (1, 0, 0, -1, -1, -1, -1, -1, 1)
_BATCH_BWD = (1, 0, 0, *_BATCH_INPUTS, 1, 1, 1)


@torch.library.register_vmap("fastseq::lstm_fwd", lib=library)
def _vmap_fwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    if any(dim is not None for dim in in_dims[3:8]):
        return transforms.one_by_one(_fwd, size, in_dims, args)
    results = _fwd(*transforms.fold_all(args, in_dims, size, _BATCH_INPUTS))
    return transforms.unfold(results, size, (1, 0, 0, 1, 1))


@torch.library.register_vmap("fastseq::lstm_bwd", lib=library)
def _vmap_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    if args[16] & NEEDS_WEIGHTS or any(dim is not None for dim in in_dims[6:11]):
        return transforms.one_by_one(_bwd, size, in_dims, args)
    results = _bwd(*transforms.fold_all(args, in_dims, size, _BATCH_BWD))
    return transforms.unfold(results, size, (1, 0, 0, -1, -1, -1, -1))
