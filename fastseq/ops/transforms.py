"""What every operation needs to live with autograd and ``torch.func``: the parts of the rules that all share.

An operation registers its backward at its own ``Autograd`` key, as a :class:`Function`. Transforms arrive there too,
one level at a time: for ``grad(vmap(f))`` the vmap rule has folded the batch before the key of the grad level is
reached, and for ``vmap(grad(f))`` the call below the key meets the vmap rule. So the one place that asks whether a
gradient is wanted sees the level that wants it; a public function that asked ``requires_grad`` would see False inside
``vmap`` and return silent zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

# The base of autograd.Function without its own dispatch over functorch levels, which the dispatcher has done already.
Function = torch.autograd.function._SingleLevelFunction

below_autograd = torch._C._after_autograd_keyset
wants_gradient: Callable[..., bool] = torch._C._any_requires_grad


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` from a kernel at the ``Autograd`` key, within a functorch transform or not."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[attr-defined]
    with enable_single_level_autograd_function():
        return function.apply(*args)  # type: ignore[attr-defined]


def redispatch(op: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    """Call ``op`` below the ``Autograd`` key, from the forward of a :class:`Function`.

    That forward runs with gradients off, as its own level wants no second graph; but the levels of functorch below it
    have not been asked yet, and would lose their gradients without a word.
    """
    if not torch._C._are_functorch_transforms_active():
        return op.redispatch(keyset & below_autograd, *args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op.redispatch(keyset & below_autograd, *args)


def refuse_forward_mode(name: str, *args: Any) -> None:
    """Raises if an argument carries a forward-mode tangent, since dropping it would be a silent zero."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(
                f"fastseq::{name} has no forward-mode derivative (jvp, jacfwd, forward_ad): "
                "use reverse mode (vjp, jacrev), or fastseq.reference, which has both"
            )


def may_overwrite_tape(tape: Tensor, *grads: Tensor | None) -> bool:
    """Whether the backward that received ``grads`` may write into its private ``tape``.

    Only in plain eager mode, when the graph is freed after this pass, and nothing is mapped: neither by functorch nor
    by the older vmap that ``torch.autograd.grad(is_grads_batched=True)`` uses.
    """
    return (
        type(tape) is Tensor
        and not tape.is_neg()
        and not torch.is_grad_enabled()
        and not _keeps_graph()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not any(grad is not None and _is_legacy_batched(grad) for grad in grads)
    )


_is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def _keeps_graph() -> bool:
    return True


_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
if _keep_graph is not None:
    _keeps_graph = _keep_graph


def fold(value: Tensor | None, mapped: int | None, size: int, batch: int) -> Tensor | None:
    """``value`` with its dimension ``mapped`` (None: the same for all) folded into dimension ``batch`` of the rest."""
    if value is None or (value.numel() == 0 and value.dim() - (mapped is not None) == 1):
        return value if value is None or mapped is None else value.select(mapped, 0)  # an absent tape: shape [0]
    value = value.unsqueeze(batch) if mapped is None else value.movedim(mapped, batch)
    shape = list(value.shape)
    shape[batch] = size
    return value.expand(shape).flatten(batch, batch + 1)


def fold_all(args: Sequence[Any], in_dims: Sequence[int | None], size: int, batch: Sequence[int]) -> list[Any]:
    """The arguments of an op folded: ``batch`` gives the batch dimension of the leading ones, -1 for what has none."""
    folded = [arg if at < 0 else fold(arg, dim, size, at) for arg, dim, at in zip(args, in_dims, batch, strict=False)]
    return [*folded, *args[len(batch) :]]


def unfold(
    results: Sequence[Tensor], size: int, batch: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The inverse of :func:`fold` for results with these batch dimensions; an absent one (``[0]``) is not mapped."""
    dims = tuple(at if value.dim() > 1 else None for value, at in zip(results, batch, strict=True))
    unfolded = (
        value if dim is None else value.unflatten(dim, (size, value.shape[dim] // size))
        for value, dim in zip(results, dims, strict=True)
    )
    return tuple(unfolded), dims


def one_by_one(
    op: Callable[..., tuple[Tensor, ...]], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmap rule that is always right: call ``op`` for each index of the mapped dimension and stack the results."""
    calls = [
        op(*(arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims, strict=True)))
        for index in range(size)
    ]
    results = tuple(torch.stack(values) for values in zip(*calls, strict=True))
    return results, (0,) * len(results)
