"""The operation nearest_center: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.nearest_center` (every device) and :mod:`fastseq.cpu.nearest_center` (C++).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu import nearest_center as kernels
from fastseq.ops import transforms
from fastseq.ops.checks import autocast_dtype, check_points, under_autocast
from fastseq.ops.dispatch import library, register_kernels
from fastseq.reference.nearest_center import nearest_center_fwd as reference_fwd

library.define(
    "nearest_center_fwd(Tensor z, Tensor centers) -> (Tensor labels, Tensor squared_distance)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_fwd = torch.ops.fastseq.nearest_center_fwd.default


def nearest_center(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point, and how far it is: the assignment step of k-means (Lloyd 1982).

    The distances come from the differences themselves, not from the expanded square, so they are exact far from the
    origin. N points, K centres, d features; one dtype (float32, float64, bfloat16, float16), one device, any strides.

    Args:
        z: points, ``[N, d]``, d at least 1.
        centers: ``[K, d]``, K at least 1.

    Returns:
        ``labels [N]`` (int64), of several nearest centres the lowest, and ``squared_distance [N]`` in the dtype of z
        (float32 under autocast), which has derivatives: those of the distance to the centre that was chosen. A NaN
        counts as the smallest distance, as for ``torch.min``.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype or device.
        fastseq.ShapeError: an argument has the wrong rank or size.
    """
    if autocast_dtype(z) is not None:
        z, centers = (under_autocast(value, torch.float32) for value in (z, centers))
    check_points(z, centers)
    labels, distance = _fwd(z, centers)
    return labels, distance


register_kernels("nearest_center_fwd", reference_fwd, kernels.nearest_center_fwd, "nearest_center")


@torch.library.register_fake("fastseq::nearest_center_fwd", lib=library)
def _fake_fwd(z: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape[0], dtype=torch.int64), z.new_empty(z.shape[0])


class NearestCenter(transforms.Function):
    """``nearest_center_fwd`` with the derivative of the distance: 2 (z_i - mu_j) for the centre j that was chosen."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, z: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
        labels, distance = transforms.redispatch(_fwd, keyset, z, centers)
        ctx.save_for_backward(z, centers, labels)
        ctx.mark_non_differentiable(labels)
        ctx.set_materialize_grads(False)
        return labels, distance

    @staticmethod
    def backward(ctx: Any, _: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        z, centers, labels = ctx.saved_tensors
        # In float32 for half types, or the sum of many gradients into one centre would stop growing.
        wide = torch.promote_types(z.dtype, torch.float32)
        scaled = 2 * grad.to(wide)[:, None] * (z.to(wide) - centers.to(wide).index_select(0, labels))
        _, need_z, need_centers = ctx.needs_input_grad
        dcenters = None
        if need_centers:  # in float64: a centre's gradient is one chain of as many sums as it has points
            sums = torch.zeros_like(centers, dtype=torch.float64).index_add(0, labels, -scaled.double())
            dcenters = sums.to(z.dtype)
        return None, scaled.to(z.dtype) if need_z else None, dcenters


def _autograd_fwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
    transforms.refuse_forward_mode("nearest_center_fwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(NearestCenter, keyset, *args)  # type: ignore[no-any-return]
    return _fwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


library.impl("nearest_center_fwd", _autograd_fwd, "Autograd", with_keyset=True)


# vmap: the mapped dimension becomes part of the points, unless the centres differ along it.


@torch.library.register_vmap("fastseq::nearest_center_fwd", lib=library)
def _vmap_fwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    if in_dims[1] is not None:
        return transforms.one_by_one(_fwd, size, in_dims, args)
    labels, distance = _fwd(*transforms.fold_all(args, in_dims, size, (0,)))
    return (labels.reshape(size, -1), distance.reshape(size, -1)), (0, 0)
