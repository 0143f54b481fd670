"""The operation target_distribution: checks, schema, fake, autograd, vmap.

The kernels are :mod:`fastseq.reference.target_distribution` (every device) and :mod:`fastseq.cpu.target_distribution`
(C++). DEC holds the target constant, so its gradient is seldom asked for: it is taken through the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu import target_distribution as kernels
from fastseq.ops import transforms
from fastseq.ops.checks import autocast_dtype, check_frequencies, check_kinds, refuse_shape, under_autocast
from fastseq.ops.dispatch import library, register_kernels
from fastseq.reference.common import accumulate_dtype, gradients
from fastseq.reference.target_distribution import target_distribution as reference
from fastseq.reference.target_distribution import target_distribution_fwd as reference_fwd

library.define(
    "target_distribution_fwd(Tensor q, Tensor? freq) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_fwd = torch.ops.fastseq.target_distribution_fwd.default


def target_distribution(q: Tensor, freq: Tensor | None = None) -> Tensor:
    """The target that sharpens an assignment (Xie, Girshick & Farhadi 2016, eq. 3).

    ``p_ij = (q_ij^2 / f_j) / sum_j (q_ij^2 / f_j)``, with ``f_j = sum_i q_ij`` over the whole data set. It has
    derivatives, as every function; :func:`clustering_loss` holds its target constant all the same, as DEC does.

    Args:
        q: soft assignments, ``[N, K]``, K at least 1; float32, float64, bfloat16 or float16, any strides.
        freq: ``f [K]`` over the whole data where ``q`` is a part of it, such as :func:`accumulate_frequencies` gives;
            positive, any floating dtype. None: q is all there is. A frequency of zero makes NaN.

    Returns:
        ``p [N, K]`` in the dtype of ``q`` (float32 under autocast), each row with the sum 1.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype or device.
        fastseq.ShapeError: an argument has the wrong rank or size.
    """
    if autocast_dtype(q) is not None:
        q = under_autocast(q, torch.float32)
    check_kinds((("q", q),), optional=frozenset())
    if q.dim() != 2 or q.shape[1] == 0:
        refuse_shape("q", "shape [N, K] with K of at least 1", q.shape)
    if freq is not None:
        check_frequencies(freq, q, "q", q.shape[1])
        freq = freq.to(accumulate_dtype(q.dtype))
    return _fwd(q, freq)  # type: ignore[no-any-return]


register_kernels("target_distribution_fwd", reference_fwd, kernels.target_distribution_fwd, "target_distribution")


@torch.library.register_fake("fastseq::target_distribution_fwd", lib=library)
def _fake_fwd(q: Tensor, freq: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


class TargetDistribution(transforms.Function):
    """``target_distribution_fwd`` with its backward, which is the reference's."""

    @staticmethod
    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, q: Tensor, freq: Tensor | None) -> Tensor:
        p: Tensor = transforms.redispatch(_fwd, keyset, q, freq)
        ctx.save_for_backward(q, freq)
        return p

    @staticmethod
    def backward(ctx: Any, grad_p: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1:]
        results = gradients(
            lambda q, freq: (reference(q, freq),), ctx.saved_tensors, asked, (grad_p,), differentiable=True
        )
        return (None, *(grad if need else None for grad, need in zip(results, asked, strict=True)))


def _autograd_fwd(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
    transforms.refuse_forward_mode("target_distribution_fwd", *args)
    if torch.is_grad_enabled() and transforms.wants_gradient(*args):
        return transforms.apply(TargetDistribution, keyset, *args)  # type: ignore[no-any-return]
    return _fwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]


library.impl("target_distribution_fwd", _autograd_fwd, "Autograd", with_keyset=True)


@torch.library.register_vmap("fastseq::target_distribution_fwd", lib=library)
def _vmap_fwd(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    if args[1] is None or in_dims[1] is not None:  # the frequencies differ along the mapped dimension
        (p,), (dim,) = transforms.one_by_one(lambda *one: (_fwd(*one),), size, in_dims, args)
        return p, dim
    folded = _fwd(*transforms.fold_all(args, in_dims, size, (0,)))
    return folded.unflatten(0, (size, folded.shape[0] // size)), 0
