"""The operation clustering_loss: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.clustering_loss` (every device) and :mod:`fastseq.cpu.clustering_loss` (C++).
The loss is a scalar, so its gradients are made in the forward pass, where q is at hand, and scaled in the backward:
nothing of size N·K is kept. They are kept unrounded (float32 for half types): scaled by 1/N they would underflow there
before a gradient scaler could help.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu import clustering_loss as kernels
from fastseq.ops import transforms
from fastseq.ops.checks import (
    autocast_dtype,
    check_alpha,
    check_frequencies,
    check_points,
    refuse_shape,
    under_autocast,
)
from fastseq.ops.dispatch import library, register_kernels
from fastseq.ops.needs import NEEDS_CENTERS, NEEDS_POINTS
from fastseq.ops.tape import accumulate_dtype
from fastseq.reference.clustering_loss import clustering_loss_bwd as reference_bwd
from fastseq.reference.clustering_loss import clustering_loss_fwd as reference_fwd
from fastseq.reference.common import gradients

REDUCTIONS = ("sum", "batchmean")

_INPUTS = "Tensor z, Tensor centers, Tensor? target, Tensor? freq"
_OPTIONS = "float alpha, str reduction, int needs"
_TAGS = (torch.Tag.pt2_compliant_tag,)

library.define(
    f"clustering_loss_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor loss, Tensor dz, Tensor dcenters)",
    tags=_TAGS,
)
library.define(
    f"clustering_loss_bwd(Tensor grad, {_INPUTS}, Tensor dz, Tensor dcenters, {_OPTIONS}) "
    "-> (Tensor gz, Tensor gcenters)",
    tags=_TAGS,
)

_fwd = torch.ops.fastseq.clustering_loss_fwd.default
_bwd = torch.ops.fastseq.clustering_loss_bwd.default


def clustering_loss(
    z: Tensor,
    centers: Tensor,
    target: Tensor | None = None,
    *,
    freq: Tensor | None = None,
    alpha: float = 1.0,
    reduction: str = "sum",
    validate: bool = False,
) -> Tensor:
    """The loss of deep embedded clustering, ``KL(P || Q) = sum_ij p_ij log(p_ij / q_ij)`` (Xie et al. 2016, eq. 2).

    ``q`` is that of :func:`student_t_assignment`. P is held constant, so no gradient flows into ``target`` or ``freq``.
    Loss and gradients are made in one pass that holds nothing of size N·K·d, and given ``freq`` instead of ``target``
    nothing of size N·K. N points, K centres, d features, any strides. NaN or infinity in z makes the loss NaN.

    Args:
        z: points, ``[N, d]``, d at least 1; float32, float64, bfloat16 or float16.
        centers: ``[K, d]``, K at least 1, in the dtype of z.
        target: ``p [N, K]``, such as :func:`target_distribution` gives, in the dtype of z (or float32 for half types).
            Its rows need not have the sum 1, but no number may be negative.
        freq: instead of ``target``, the frequencies ``f [K]`` of the whole data (:func:`accumulate_frequencies`), from
            which ``p`` is made along with q; positive, any floating dtype.
        alpha: degrees of freedom, positive. DEC takes 1.
        reduction: ``"sum"``, or ``"batchmean"`` for the sum over N.
        validate: look at the numbers too: that z and centers are finite, that target is not negative and its rows have
            the sum 1 (to the square root of its dtype's precision), and that freq is positive. Not under
            ``torch.compile`` or ``torch.func``.

    Returns:
        A scalar in the dtype of z; float32 for half types, which could not hold a sum over many points.

    Raises:
        TypeError: an argument is no tensor, has the wrong dtype or device, or alpha is no number; or not exactly one of
            target and freq is given.
        ValueError: alpha is not positive and finite, reduction has no such value, or validate found something.
        fastseq.ShapeError: an argument has the wrong rank or size.
    """
    if autocast_dtype(z) is not None:  # as torch treats cdist and kl_div
        z, centers, target = (under_autocast(value, torch.float32) for value in (z, centers, target))
    check_points(z, centers)
    alpha = check_alpha(alpha)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if (target is None) == (freq is None):
        raise TypeError(f"expected either target or freq, got {'neither' if target is None else 'both'}")
    wide = accumulate_dtype(z.dtype)
    if target is not None:
        _check_target(target, z, (z.shape[0], centers.shape[0]))
        target = target.detach()
    if freq is not None:
        check_frequencies(freq, z, "z", centers.shape[0])
        freq = freq.detach().to(wide)
    if validate:
        _check_values(z, centers, target, freq)
    loss, _dz, _dcenters = _fwd(z, centers, target, freq, alpha, reduction, 0)
    return loss  # type: ignore[no-any-return]


def _check_target(target: Any, z: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor or None, got {type(target).__name__}")
    wide = accumulate_dtype(z.dtype)
    if target.dtype not in (z.dtype, wide):
        others = "" if wide == z.dtype else f" or {wide}"
        raise TypeError(f"target: expected {z.dtype}{others}, the dtype of z, got {target.dtype}")
    if target.device != z.device:
        raise TypeError(f"target: expected device {z.device}, that of z, got {target.device}")
    if target.layout != torch.strided:
        raise TypeError(f"target: expected a dense tensor, got layout {target.layout}")
    if target.shape != shape:
        refuse_shape("target", f"shape [N, K] = {list(shape)}", target.shape)


def _check_values(z: Tensor, centers: Tensor, target: Tensor | None, freq: Tensor | None) -> None:
    for name, value in (("z", z), ("centers", centers)):
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if freq is not None and not bool((freq > 0).all() & freq.isfinite().all()):
        raise ValueError("freq: expected positive finite numbers")
    if target is not None and target.numel() > 0:
        if not bool((target >= 0).all()):
            raise ValueError("target: expected numbers that are not negative, got negative ones or NaN")
        off = (target.sum(-1, dtype=torch.float64) - 1).abs().max().item()
        if not off <= torch.finfo(target.dtype).eps ** 0.5:
            raise ValueError(f"target: expected rows whose sum is 1, got one that is off by {off:.3g}")


# The kernels.

register_kernels("clustering_loss_fwd", reference_fwd, kernels.clustering_loss_fwd, "clustering_loss")
# A scaling: torch's own is as good as any.
register_kernels("clustering_loss_bwd", reference_bwd, reference_bwd, "clustering_loss")


# Shapes without data, for torch.compile and torch.export.


@torch.library.register_fake("fastseq::clustering_loss_fwd", lib=library)
def _fake_fwd(
    z: Tensor,
    centers: Tensor,
    target: Tensor | None,
    freq: Tensor | None,
    alpha: float,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(z.dtype)
    return (
        z.new_empty((), dtype=wide),
        z.new_empty(z.shape if needs & NEEDS_POINTS else 0, dtype=wide),
        z.new_empty(centers.shape if needs & NEEDS_CENTERS else 0, dtype=wide),
    )


@torch.library.register_fake("fastseq::clustering_loss_bwd", lib=library)
def _fake_bwd(
    grad: Tensor,
    z: Tensor,
    centers: Tensor,
    target: Tensor | None,
    freq: Tensor | None,
    dz: Tensor,
    dcenters: Tensor,
    alpha: float,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(z.shape if needs & NEEDS_POINTS else 0),
        z.new_empty(centers.shape if needs & NEEDS_CENTERS else 0),
    )


# Autograd.


class ClusteringLoss(transforms.Function):
    """``clustering_loss_fwd`` with its backward: the forward makes the gradients, unless the caller asked for them."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        *inputs, alpha, reduction, asked = args
        _, need_z, need_centers = ctx.needs_input_grad[:3]
        ctx.needs = NEEDS_POINTS * need_z | NEEDS_CENTERS * need_centers
        loss, dz, dcenters = transforms.redispatch(_fwd, keyset, *inputs, alpha, reduction, ctx.needs | asked)
        ctx.save_for_backward(*inputs, dz, dcenters)
        ctx.options = alpha, reduction
        ctx.private = asked == 0
        if ctx.private:
            dz, dcenters = dz.new_empty(0), dcenters.new_empty(0)
        ctx.mark_non_differentiable(dz, dcenters)
        ctx.set_materialize_grads(False)
        return loss, dz, dcenters

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        *inputs, dz, dcenters = ctx.saved_tensors
        z = inputs[0]
        if ctx.private and dz.dtype in (z.dtype, torch.float64) and transforms.may_overwrite_tape(dz, grad):
            gz, gcenters = _scaled_in_place(grad, dz), _scaled_in_place(grad, dcenters)
        else:
            gz, gcenters = _bwd(grad, *inputs, dz, dcenters, *ctx.options, ctx.needs)
        need_z, need_centers = ctx.needs & NEEDS_POINTS, ctx.needs & NEEDS_CENTERS
        return None, gz if need_z else None, gcenters if need_centers else None, *(None,) * 5


def _scaled_in_place(grad: Tensor, made: Tensor) -> Tensor:
    """``made`` times the scalar that arrived. On the CPU it costs nothing to look: most often it is 1."""
    return made if grad.device.type == "cpu" and grad.item() == 1 else made.mul_(grad)


class ClusteringLossBackward(transforms.Function):
    """``clustering_loss_bwd`` with its own backward: second derivatives go through the reference."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = transforms.redispatch(_bwd, keyset, *args)
        ctx.save_for_backward(*args[:5])  # grad … freq: dz and dcenters are functions of these
        ctx.options = args[7:]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, target, freq = ctx.saved_tensors
        asked = ctx.needs_input_grad[1:4]

        def bwd(*inputs: Any) -> tuple[Tensor, ...]:
            unused = inputs[1]  # for dz and dcenters
            args = [*inputs, target, freq, unused, unused, *ctx.options]
            return reference_bwd(*args, differentiable=True)

        results = gradients(bwd, inputs, asked, grads, differentiable=True)
        return (None, *(grad if need else None for grad, need in zip(results, asked, strict=True)), *(None,) * 7)


def _autograd_fwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("clustering_loss_fwd", *args[:2])
    if torch.is_grad_enabled() and transforms.wants_gradient(*args[:2]):
        return transforms.apply(ClusteringLoss, keyset, *args)  # type: ignore[no-any-return]
    return _fwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


def _autograd_bwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("clustering_loss_bwd", *args[:3])
    if torch.is_grad_enabled() and transforms.wants_gradient(*args[:3]):
        return transforms.apply(ClusteringLossBackward, keyset, *args)  # type: ignore[no-any-return]
    return _bwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


library.impl("clustering_loss_fwd", _autograd_fwd, "Autograd", with_keyset=True)
library.impl("clustering_loss_bwd", _autograd_bwd, "Autograd", with_keyset=True)


# vmap: a loss per index of the mapped dimension, so nothing can be folded.


@torch.library.register_vmap("fastseq::clustering_loss_fwd", lib=library)
def _vmap_fwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    return transforms.one_by_one(_fwd, info.batch_size, in_dims, args)


@torch.library.register_vmap("fastseq::clustering_loss_bwd", lib=library)
def _vmap_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    return transforms.one_by_one(_bwd, info.batch_size, in_dims, args)
