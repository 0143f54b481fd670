"""What the tests of the modules share: twins of torch's and fastseq's modules, and their comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastseq
from fastseq.testing import compare_tensor

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: fastseq.LSTM,
    nn.RNN: fastseq.RNN,
    nn.LSTMCell: fastseq.LSTMCell,
    nn.RNNCell: fastseq.RNNCell,
}


def twins(torch_class: type[nn.Module], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch's module and fastseq's, from the same seed; their equality is a test of its own."""
    made = []
    for cls in (torch_class, TWINS[torch_class]):
        torch.manual_seed(3)
        made.append(cls(*args, **kwargs))
    return made[0], made[1]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples and PackedSequences, in order; the integers of a PackedSequence are left out."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [tensor for each in value for tensor in tensors(each)]


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The same arguments with floating tensors in dtype, as fresh leaves."""
    if isinstance(value, PackedSequence):
        return PackedSequence(to_dtype(value.data, dtype), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().to(dtype).requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return tuple(to_dtype(each, dtype) for each in value)
    return value


@dataclass(frozen=True)
class Results:
    """What one call gave: its outputs, and the gradients of one loss with respect to inputs and parameters."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def run(module: nn.Module, args: Any, call: Callable[..., Any] | None = None) -> Results:
    """Calls the module (or call) on args and differentiates; a leaf that received no gradient shows zeros."""
    outputs = tensors((module if call is None else call)(*args))
    leaves = [leaf for leaf in tensors(args) if leaf.requires_grad] + list(module.parameters())
    generator = torch.Generator().manual_seed(5)
    # Weights that differ by element, so that no error hides in a sum; small integers, exact in every dtype.
    loss = sum(
        (output * torch.randint(1, 17, output.shape, generator=generator).to(output.dtype)).sum()
        for output in outputs
        if output.numel()
    )
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    return Results([output.detach() for output in outputs], gradients)


def assert_twins_agree(theirs: nn.Module, ours: nn.Module, args: Any, dtype: torch.dtype, seed: int = 11) -> None:
    """Outputs and gradients of ours in dtype, against torch's module in float64.

    The yardstick of the tolerance rule is torch's module in dtype, or the reference in dtype if it is less exact.
    """

    def results(module: nn.Module, dtype: torch.dtype) -> Results:
        torch.manual_seed(seed)  # for dropout
        return run(copy.deepcopy(module).to(dtype), to_dtype(args, dtype))

    truth, got = results(theirs, torch.float64), results(ours, dtype)
    with fastseq.testing.use_implementation("reference"):
        yardsticks = [results(theirs, dtype), results(ours, dtype)]
    assert_agree(got, truth, yardsticks)


def assert_agree(got: Results, truth: Results, yardsticks: Sequence[Results]) -> None:
    """The rule of :mod:`fastseq.testing`, for each output and for the gradient.

    The gradient is one vector, leaves end to end. A leaf of two elements, behind saturated units or cancelling sums,
    has a relative error of any size in any arithmetic; taken alone, its yardstick would be a matter of luck.
    """
    assert [(each.shape, each.dtype) for each in got.outputs + got.gradients] == [
        (each.shape, got.outputs[0].dtype) for each in truth.outputs + truth.gradients
    ]
    for index, output in enumerate(got.outputs):
        assert_close(output, truth.outputs[index], [each.outputs[index] for each in yardsticks], f"output {index}")
    vector, expected, *references = (
        torch.cat([gradient.flatten() for gradient in each.gradients]) for each in (got, truth, *yardsticks)
    )
    assert_close(vector, expected, references, "gradient")


def assert_close(got: Tensor, truth: Tensor, references: Sequence[Tensor], what: str) -> None:
    """The rule of :mod:`fastseq.testing`, with the least exact of the references as the yardstick."""
    if truth.numel() == 0:
        return
    yardstick = max(references, key=lambda reference: (reference.double() - truth).abs().max().item())
    comparison = compare_tensor(what, got, yardstick, truth)
    assert comparison.ok, str(comparison)


def assert_same(got: Any, expected: Any) -> None:
    """Equal but for rounding, in float64: what is compared is the same arithmetic, done in another layout or batch."""
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert one.dtype == other.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
