"""What the references of the recurrences share: time structure as masks, rounding, and freedom from autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed in float32; float32 and float64 in themselves."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def rounded(h: Tensor, dtype: torch.dtype) -> Tensor:
    """``h`` rounded to ``dtype`` but kept in its own dtype; the derivative is that of the identity.

    A cast there and back would round the gradient too, at every step, which is no part of the specification.
    """
    if h.dtype == dtype:
        return h
    return h + (h.to(dtype).to(h.dtype) - h).detach()


def zoned_out(before: Tensor, fresh: Tensor, zoneout: Tensor | float | None, t: int) -> Tensor:
    """Zoneout (Krueger et al. 2017): ``before`` where the mask ``bool [T, B, ·]`` says so at step t, or by its rate."""
    if zoneout is None:
        return fresh
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout[t], before, fresh)
    return zoneout * before + (1 - zoneout) * fresh


def per_step(state: Tensor) -> Tensor:
    """A reset state ``[B, ·]`` or ``[T, B, ·]`` as ``[1 or T, B, ·]``."""
    return state if state.dim() == 3 else state.unsqueeze(0)


def reset_row(rows: Tensor | None, t: int) -> Tensor | float:
    """The reset state ``[B, ·]`` that step t takes, of ``[1 or T, B, ·]``; zero if there are none."""
    return 0.0 if rows is None else rows[t if len(rows) > 1 else 0]


class _ClipGradient(torch.autograd.Function):
    """The identity, whose backward clips the gradient elementwise to ±limit."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, limit: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return grads[0].clamp(-ctx.limit, ctx.limit), None


def clip_gradient(value: Tensor, limit: float) -> Tensor:
    """``value``, whose gradient is clipped elementwise to ±limit in the backward."""
    clipped: Tensor = _ClipGradient.apply(value, limit)  # type: ignore[no-untyped-call]
    return clipped


def time_masks(
    lengths: Tensor | None, reset: Tensor | None, steps: int, reverse: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """``(cut, padding)``, each ``[T, B]`` bool or None, for the direction of the op.

    Step ``t`` is padding when ``t >= lengths``: it carries the state and outputs zero. ``reset[t]`` cuts between ``t``
    and ``t - 1``: the step of the two that is processed later starts from the zero state. A reset in the padding cuts
    nothing.
    """
    padding = None
    if lengths is not None:
        padding = torch.arange(steps, device=device)[:, None] >= lengths.to(device)  # [T, B]
    if reset is None:
        return None, padding
    reset = reset.to(device)
    if padding is not None:
        reset = reset & ~padding
    if reverse:  # the cut between t + 1 and t comes before step t
        reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    return reset, padding


def flag_masks(flags: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``(cut, padding)`` from step flags, as :mod:`fastseq.ops.flags` makes them."""
    if flags is None:
        return None, None
    return (flags & 1) != 0, (flags & 2) != 0


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The references choose their dtypes themselves: autocast must not round inside them."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    asked: Sequence[object],
    received: Sequence[Tensor | None],
    *,
    differentiable: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of ``function`` with respect to those of its ``inputs`` that are ``asked`` for.

    ``received`` are the gradients of its first results; None says that a result is not used. An input that is not asked
    for, or is None, gets a tensor of shape ``[0]``. With ``differentiable``, autograd and every transform can pass
    through; without, it may be called below the autograd dispatch key, as a kernel is.
    """
    example = next(value for value in inputs if value is not None)
    results = [example.new_empty(0) for _ in inputs]
    wanted = {index: value for index, value in enumerate(inputs) if asked[index] and value is not None}
    used = {index: grad for index, grad in enumerate(received) if grad is not None}
    if not used:
        for index, value in wanted.items():
            results[index] = torch.zeros_like(value, memory_format=torch.contiguous_format)
    elif wanted:

        def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(inputs)
            for index, value in zip(wanted, values, strict=True):
                full[index] = value
            outputs = function(*full)
            return tuple(outputs[index] for index in used)

        pull_back = _pull_back_differentiably if differentiable else _pull_back
        with without_autocast(example):
            found = pull_back(of_wanted, tuple(wanted.values()), tuple(used.values()))
        for index, grad in zip(wanted, found, strict=True):
            results[index] = grad
    return tuple(results)


def _pull_back_differentiably(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], received: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    # Not torch.autograd.grad: inputs that depend on each other must stay apart, and it knows nothing of functorch.
    pullback = torch.func.vjp(function, *inputs)[1]
    return pullback(received)  # type: ignore[no-any-return]


def _pull_back(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], received: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    # A kernel may run with autograd switched off in the dispatcher, as within a compiled graph or a dispatch mode.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in inputs]
        found = torch.autograd.grad(function(*leaves), leaves, received, materialize_grads=True)
    return tuple(grad.contiguous() for grad in found)


_AUTOGRAD_KEYS = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
)
