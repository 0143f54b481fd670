"""The operation rnn, one Elman layer in one direction over the whole sequence: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.rnn` (every device) and :mod:`fastseq.cpu.rnn` (C++);
``torch.ops.fastseq.rnn_fwd`` and ``rnn_bwd`` are the ops beneath. Beside ``y`` the tape holds the slope of the
nonlinearity at every step (see :mod:`fastseq.ops.tape`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu import rnn as kernels
from fastseq.ops import transforms
from fastseq.ops.checks import autocast_dtype, check_kinds, check_shapes, check_time, refuse_shape, under_autocast
from fastseq.ops.dispatch import library, register_kernels
from fastseq.ops.flags import step_flags
from fastseq.ops.needs import NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.tape import accumulate_dtype, slopes_shape
from fastseq.reference.common import gradients
from fastseq.reference.rnn import NONLINEARITIES
from fastseq.reference.rnn import rnn_bwd as reference_bwd
from fastseq.reference.rnn import rnn_fwd as reference_fwd

_INPUTS = "Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? flags"
_TAGS = (torch.Tag.pt2_compliant_tag,)

_GRADS = "Tensor? grad_y, Tensor? grad_h_n"
_RESULTS = "(Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db)"

library.define(
    f"rnn_fwd({_INPUTS}, str nonlinearity, bool reverse, bool save) -> (Tensor y, Tensor h_n, Tensor slopes)",
    tags=_TAGS,
)
library.define(
    f"rnn_bwd({_GRADS}, {_INPUTS}, Tensor y, Tensor slopes, str nonlinearity, bool reverse, int needs) -> {_RESULTS}",
    tags=_TAGS,
)
# The same, but free to overwrite the slopes with the gradients: for eager mode, when the graph is not kept.
library.define(
    f"rnn_bwd_({_GRADS}, {_INPUTS}, Tensor y, Tensor(a!) slopes, str nonlinearity, bool reverse, int needs)"
    f" -> {_RESULTS}",
    tags=_TAGS,
)

_fwd = torch.ops.fastseq.rnn_fwd.default
_bwd = torch.ops.fastseq.rnn_bwd.default
_bwd_ = torch.ops.fastseq.rnn_bwd_.default


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
        optional=frozenset(("b_ih", "b_hh")),
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


# The kernels.


def _overwriting_bwd(*args: Any) -> tuple[Tensor, ...]:
    torch.autograd.graph.increment_version(args[10])
    return kernels.rnn_bwd(*args, overwrite=True)


register_kernels("rnn_fwd", reference_fwd, kernels.rnn_fwd)
register_kernels("rnn_bwd", reference_bwd, kernels.rnn_bwd)
register_kernels("rnn_bwd_", reference_bwd, _overwriting_bwd)


# Shapes without data, for torch.compile and torch.export.


@torch.library.register_fake("fastseq::rnn_fwd", lib=library)
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


def _fake_bwd(
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
) -> tuple[Tensor, ...]:
    bias = b_hh if b_ih is None else b_ih
    weights = needs & NEEDS_WEIGHTS
    asked = (needs & NEEDS_X, needs & NEEDS_STATE, weights, weights, weights)
    return tuple(
        x.new_empty(value.shape) if need and value is not None else x.new_empty(0)
        for need, value in zip(asked, (x, h0, w_ih, w_hh, bias), strict=True)
    )


torch.library.register_fake("fastseq::rnn_bwd", _fake_bwd, lib=library)
torch.library.register_fake("fastseq::rnn_bwd_", _fake_bwd, lib=library)


# Autograd.


class RNN(transforms.Function):
    """``rnn_fwd`` with its backward. When the caller did not ask for the tape, it keeps one that nobody else sees."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        *inputs, nonlinearity, reverse, save = args
        y, h_n, slopes = transforms.redispatch(_fwd, keyset, *inputs, nonlinearity, reverse, True)
        ctx.save_for_backward(*inputs, y, slopes)
        ctx.options = nonlinearity, reverse
        ctx.private = not save
        ctx.set_materialize_grads(False)
        if not save:
            slopes = slopes.new_empty(0)
        ctx.mark_non_differentiable(slopes)
        return y, h_n, slopes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_h_n = grads[:2]
        if grad_y is None and grad_h_n is None:
            return (None,) * 11
        _, need_x, need_h0, *need_weights = ctx.needs_input_grad[:7]
        needs = NEEDS_X * need_x | NEEDS_STATE * need_h0 | NEEDS_WEIGHTS * any(need_weights)
        saved = ctx.saved_tensors
        bwd = _bwd_ if ctx.private and transforms.may_overwrite_tape(saved[-1], grad_y, grad_h_n) else _bwd
        dx, dh0, dw_ih, dw_hh, db = bwd(grad_y, grad_h_n, *saved, *ctx.options, needs)
        need_w_ih, need_w_hh, need_b_ih, need_b_hh = need_weights
        return (
            None,
            dx if need_x else None,
            dh0 if need_h0 else None,
            dw_ih if need_w_ih else None,
            dw_hh if need_w_hh else None,
            db if need_b_ih else None,
            # Not the same tensor twice, or whoever scales one gradient in place would scale both.
            (db.clone() if need_b_ih else db) if need_b_hh else None,
            None,
            None,
            None,
            None,
        )


class RNNBackward(transforms.Function):
    """``rnn_bwd`` with its own backward: second derivatives go through the reference, whatever kernel served."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = transforms.redispatch(_bwd, keyset, *args)
        ctx.save_for_backward(*args[:9])  # grad_y … flags: y and the tape are functions of these
        ctx.options = args[11:]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, flags = ctx.saved_tensors
        asked = ctx.needs_input_grad[1:9]

        def bwd(*inputs: Any) -> tuple[Tensor, ...]:
            args = [*inputs, flags, inputs[2], inputs[2], *ctx.options]  # anything for y and slopes: they are not used
            return reference_bwd(*args, differentiable=True)

        results = gradients(bwd, inputs, asked, grads, differentiable=True)
        return (None, *(grad if need else None for grad, need in zip(results, asked, strict=True)), *(None,) * 6)


def _autograd_fwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("rnn_fwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(RNN, keyset, *args)  # type: ignore[no-any-return]
    return _fwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


def _autograd_bwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("rnn_bwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(RNNBackward, keyset, *args)  # type: ignore[no-any-return]
    return _bwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


def _autograd_bwd_(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        raise RuntimeError("fastseq::rnn_bwd_ has no derivative: it overwrites its tape; use fastseq::rnn_bwd")
    return _bwd_.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


library.impl("rnn_fwd", _autograd_fwd, "Autograd", with_keyset=True)
library.impl("rnn_bwd", _autograd_bwd, "Autograd", with_keyset=True)
library.impl("rnn_bwd_", _autograd_bwd_, "Autograd", with_keyset=True)


# vmap: the mapped dimension becomes part of the batch, unless weights or their gradients differ along it.

# The batch dimension of each tensor, in the order of the schemas; -1: a weight, which has none.
_BATCH_INPUTS = (1, 0, -1, -1, -1, -1, 1)
_BATCH_BWD = (1, 0, *_BATCH_INPUTS, 1, 1)


@torch.library.register_vmap("fastseq::rnn_fwd", lib=library)
def _vmap_fwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    if any(dim is not None for dim in in_dims[2:6]):
        return transforms.one_by_one(_fwd, size, in_dims, args)
    results = _fwd(*transforms.fold_all(args, in_dims, size, _BATCH_INPUTS))
    return transforms.unfold(results, size, (1, 0, 1))


@torch.library.register_vmap("fastseq::rnn_bwd", lib=library)
def _vmap_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    if args[13] & NEEDS_WEIGHTS or any(dim is not None for dim in in_dims[4:8]):
        return transforms.one_by_one(_bwd, size, in_dims, args)
    results = _bwd(*transforms.fold_all(args, in_dims, size, _BATCH_BWD))
    return transforms.unfold(results, size, (1, 0, -1, -1, -1))
