"""The operation student_t_assignment: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.student_t` (every device) and :mod:`fastseq.cpu.student_t` (C++). The backward
makes q again from z and the centres: it costs less than to keep it, and q has been rounded where types are half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu import student_t as kernels
from fastseq.ops import transforms
from fastseq.ops.checks import autocast_dtype, check_alpha, check_points, under_autocast
from fastseq.ops.dispatch import library, register_kernels
from fastseq.ops.needs import NEEDS_CENTERS, NEEDS_POINTS
from fastseq.reference.common import gradients
from fastseq.reference.student_t import student_t_bwd as reference_bwd
from fastseq.reference.student_t import student_t_fwd as reference_fwd

_TAGS = (torch.Tag.pt2_compliant_tag,)

library.define("student_t_fwd(Tensor z, Tensor centers, float alpha) -> Tensor", tags=_TAGS)
library.define(
    "student_t_bwd(Tensor grad_q, Tensor z, Tensor centers, float alpha, int needs) -> (Tensor dz, Tensor dcenters)",
    tags=_TAGS,
)

_fwd = torch.ops.fastseq.student_t_fwd.default
_bwd = torch.ops.fastseq.student_t_bwd.default


def student_t_assignment(z: Tensor, centers: Tensor, alpha: float = 1.0) -> Tensor:
    """The soft assignment of points to centres by a Student's t kernel (Xie, Girshick & Farhadi 2016, eq. 1).

    ``q_ij = u_ij / sum_j u_ij`` with ``u_ij = (1 + ||z_i - mu_j||^2 / alpha)^(-(alpha + 1) / 2)``. It is exact far from
    the origin and finite far from every centre. N points, K centres, d features; the tensors share one dtype (float32,
    float64, bfloat16, float16) and one device, and may have any strides. NaN or infinity in a point makes its row NaN.

    Args:
        z: points, ``[N, d]``, d at least 1.
        centers: ``[K, d]``, K at least 1.
        alpha: degrees of freedom, positive. DEC takes 1.

    Returns:
        ``q [N, K]`` in the dtype of ``z`` (float32 under autocast), each row with the sum 1.

    Raises:
        TypeError: an argument is no tensor, has the wrong dtype or device, or alpha is no number.
        ValueError: alpha is not positive and finite.
        fastseq.ShapeError: an argument has the wrong rank or size.
    """
    if autocast_dtype(z) is not None:  # as torch treats cdist and softmax
        z, centers = (under_autocast(value, torch.float32) for value in (z, centers))
    check_points(z, centers)
    return _fwd(z, centers, check_alpha(alpha))  # type: ignore[no-any-return]


# The kernels.

register_kernels("student_t_fwd", reference_fwd, kernels.student_t_fwd, "student_t_assignment")
register_kernels("student_t_bwd", reference_bwd, kernels.student_t_bwd, "student_t_assignment")


# Shapes without data, for torch.compile and torch.export.


@torch.library.register_fake("fastseq::student_t_fwd", lib=library)
def _fake_fwd(z: Tensor, centers: Tensor, alpha: float) -> Tensor:
    return z.new_empty((z.shape[0], centers.shape[0]))


@torch.library.register_fake("fastseq::student_t_bwd", lib=library)
def _fake_bwd(grad_q: Tensor, z: Tensor, centers: Tensor, alpha: float, needs: int) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(z.shape if needs & NEEDS_POINTS else 0),
        z.new_empty(centers.shape if needs & NEEDS_CENTERS else 0),
    )


# Autograd.


class StudentT(transforms.Function):
    """``student_t_fwd`` with its backward."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, z: Tensor, centers: Tensor, alpha: float) -> Tensor:
        q: Tensor = transforms.redispatch(_fwd, keyset, z, centers, alpha)
        ctx.save_for_backward(z, centers)
        ctx.alpha = alpha
        return q

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        _, need_z, need_centers, _ = ctx.needs_input_grad
        needs = NEEDS_POINTS * need_z | NEEDS_CENTERS * need_centers
        dz, dcenters = _bwd(grad_q, *ctx.saved_tensors, ctx.alpha, needs)
        return None, dz if need_z else None, dcenters if need_centers else None, None


class StudentTBackward(transforms.Function):
    """``student_t_bwd`` with its own backward: second derivatives go through the reference, whatever kernel served."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = transforms.redispatch(_bwd, keyset, *args)
        ctx.save_for_backward(*args[:3])
        ctx.options = args[3:]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1:4]

        def bwd(*inputs: Any) -> tuple[Tensor, ...]:
            return reference_bwd(*inputs, *ctx.options, differentiable=True)

        results = gradients(bwd, ctx.saved_tensors, asked, grads, differentiable=True)
        return (None, *(grad if need else None for grad, need in zip(results, asked, strict=True)), None, None)


def _autograd_fwd(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
    transforms.refuse_forward_mode("student_t_fwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(StudentT, keyset, *args)  # type: ignore[no-any-return]
    return _fwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


def _autograd_bwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("student_t_bwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(StudentTBackward, keyset, *args)  # type: ignore[no-any-return]
    return _bwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


library.impl("student_t_fwd", _autograd_fwd, "Autograd", with_keyset=True)
library.impl("student_t_bwd", _autograd_bwd, "Autograd", with_keyset=True)


# vmap: the mapped dimension becomes part of the points, unless centres or their gradients differ along it.


@torch.library.register_vmap("fastseq::student_t_fwd", lib=library)
def _vmap_fwd(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    if in_dims[1] is not None:
        (q,), (dim,) = transforms.one_by_one(lambda *one: (_fwd(*one),), size, in_dims, args)
        return q, dim
    folded = _fwd(*transforms.fold_all(args, in_dims, size, (0,)))
    return folded.unflatten(0, (size, folded.shape[0] // size)), 0


@torch.library.register_vmap("fastseq::student_t_bwd", lib=library)
def _vmap_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    if args[4] & NEEDS_CENTERS or in_dims[2] is not None:
        return transforms.one_by_one(_bwd, size, in_dims, args)
    results = _bwd(*transforms.fold_all(args, in_dims, size, (0, 0)))
    return transforms.unfold(results, size, (0, -1))
