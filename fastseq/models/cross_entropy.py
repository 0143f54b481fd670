"""Cross entropy of linear logits that never holds all of the logits at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 1 << 21  # numbers of logits held at once, 8 MiB in float32
IGNORED = -100  # a target that counts for nothing, as in torch


def linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """``F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction)`` in nats, row block by row block.

    At most :data:`LOGITS` logits exist at a time. What fits is computed in one plain call. More is served by
    ``torch.nn.functional.linear_cross_entropy`` where torch has it (2.13), and elsewhere by the same in Python: both
    make the gradients in the forward, while a block of logits is there, and so have no second derivatives and do not
    serve ``torch.func``.

    Args:
        input: [N, H].
        weight: [V, H].
        target: int64 [N], from 0 to V - 1, or :data:`IGNORED`.
        bias: [V], or None.
        reduction: ``"mean"``, over the targets that count, or ``"sum"``.

    Raises:
        ValueError: ``reduction`` is something else.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    rows = max(1, LOGITS // max(1, weight.size(0)))
    if input.size(0) <= rows:
        return _plain(input, weight, target, bias, reduction)
    if hasattr(F, "linear_cross_entropy"):
        options: Any = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(
            input, weight, target, linear_bias=bias, reduction=reduction, ignore_index=IGNORED, options=options
        )
    total: Tensor = _Blocks.apply(input, weight, bias, target, rows)  # type: ignore[no-untyped-call]
    return total if reduction == "sum" else total / (target != IGNORED).sum()


class _Blocks(torch.autograd.Function):
    """The sum of the cross entropies, with the gradients of :func:`_plain` made block by block in the forward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: int) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=input.device)
        wanted = any(ctx.needs_input_grad)
        dinput = torch.empty_like(input) if wanted else None
        dweight = torch.zeros_like(weight, dtype=wide) if wanted else None
        dbias = torch.zeros_like(bias, dtype=wide) if wanted and bias is not None else None
        for start in range(0, input.size(0), rows):
            some, targets = input[start : start + rows], target[start : start + rows]
            counted = (targets != IGNORED).unsqueeze(1)
            place = targets.clamp(min=0).unsqueeze(1)
            logits = F.linear(some, weight, bias).to(wide)
            norm = logits.logsumexp(dim=1, keepdim=True)
            total += (norm - logits.gather(1, place)).masked_fill(~counted, 0).sum()
            if dinput is None or dweight is None:
                continue
            slope = logits.sub_(norm).exp_()  # softmax less one at the target
            slope.scatter_add_(1, place, slope.new_full(place.shape, -1.0)).masked_fill_(~counted, 0)
            if dbias is not None:
                dbias += slope.sum(0)
            slope = slope.to(input.dtype)
            dinput[start : start + rows] = slope @ weight
            dweight += slope.t() @ some
        if dinput is not None and dweight is not None:
            ctx.save_for_backward(dinput, dweight.to(weight), None if bias is None or dbias is None else dbias.to(bias))
        return total.to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if each is None else each * upstream for each in ctx.saved_tensors), None, None


def _plain(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    logits = F.linear(input, weight, bias)
    # As in _Blocks, and as under autocast: with each row's logarithm rounded to bfloat16 the mean over 76 rows was off
    # by up to two units in the last place.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, target, reduction=reduction, ignore_index=IGNORED)
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(logits.dtype)
