"""What the tests of the modules share: twins of torch's and fastseq's modules, and their comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastseq
from fastseq.testing import _compare

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


def run(module: nn.Module, args: Any, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that want one, then those of the parameters (None: it got none)."""
    outputs = tensors((module if call is None else call)(*args))
    leaves = [leaf for leaf in tensors(args) if leaf.requires_grad] + list(module.parameters())
    generator = torch.Generator().manual_seed(5)
    # Weights that differ by element, so that no error hides in a sum; small integers, exact in every dtype.
    loss = sum(
        (output * torch.randint(1, 17, output.shape, generator=generator).to(output.dtype)).sum()
        for output in outputs
        if output.numel()
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [output.detach() for output in outputs] + [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)
    ]


def assert_twins_agree(theirs: nn.Module, ours: nn.Module, args: Any, dtype: torch.dtype, seed: int = 11) -> None:
    """The one tolerance rule, with torch's module in float64 as the truth.

    The yardstick is the reference in dtype, and torch's module in dtype: a tensor of two elements may come out exact in
    either by luck, which says nothing of the other.
    """

    def results(module: nn.Module, kind: torch.dtype) -> list[Tensor]:
        torch.manual_seed(seed)  # for dropout
        return run(copy.deepcopy(module).to(kind), to_dtype(args, kind))

    truths, got = results(theirs, torch.float64), results(ours, dtype)
    with fastseq.testing.use_implementation("reference"):
        yardsticks = [results(theirs, dtype), results(ours, dtype)]
    for index, (one, truth, *references) in enumerate(zip(got, truths, *yardsticks, strict=True)):
        assert one.shape == truth.shape
        assert {one.dtype, *(reference.dtype for reference in references)} == {dtype}
        assert_close(one, truth, references, f"tensor {index} of {type(ours).__name__}")


def assert_close(got: Tensor, truth: Tensor, references: Sequence[Tensor], what: str) -> None:
    """The rule of :mod:`fastseq.testing`, with the least exact of the references as the yardstick."""
    yardstick = max(references, key=lambda reference: (reference.double() - truth).norm().item())
    comparison = _compare(what, got, yardstick, truth)
    assert comparison.ok, str(comparison)
