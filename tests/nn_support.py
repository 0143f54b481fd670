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


class Agreement:
    """Holds results and gradients of pairs of modules against torch's module in float64, by the one tolerance rule.

    In float64 the rule takes each tensor by itself. In a narrower dtype its yardstick is the error of torch's module in
    that dtype, or of the reference if that is greater; and where a tensor has two elements that cancel in a sum, that
    error is a matter of luck. So all tensors that were added, each scaled by a power of two to a largest element from
    1/2 to 1, are one tensor to the rule: what it allows is relative to each tensor, and the luck evens out.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._pool: list[list[Tensor]] = []  # one list per tensor: got, truth, yardsticks

    def add(self, theirs: nn.Module, ours: nn.Module, args: Any, seed: int = 11) -> None:
        def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
            torch.manual_seed(seed)  # for dropout
            return run(copy.deepcopy(module).to(dtype), to_dtype(args, dtype))

        truths, got = results(theirs, torch.float64), results(ours, self.dtype)
        with fastseq.testing.use_implementation("reference"):
            yardsticks = [results(theirs, self.dtype), results(ours, self.dtype)]
        for index, (one, truth, *references) in enumerate(zip(got, truths, *yardsticks, strict=True)):
            assert one.shape == truth.shape
            assert {one.dtype, *(reference.dtype for reference in references)} == {self.dtype}
            if self.dtype == torch.float64:
                assert_close(one, truth, references, f"tensor {index} of {type(ours).__name__}")
            elif truth.numel():
                exponent = torch.frexp(truth.abs().max()).exponent
                self._pool.append([torch.ldexp(each, -exponent).flatten() for each in (one, truth, *references)])

    def check(self) -> None:
        if self._pool:
            got, truth, *references = (torch.cat(column) for column in zip(*self._pool, strict=True))
            assert_close(got, truth, references, f"{len(self._pool)} tensors")


def assert_twins_agree(theirs: nn.Module, ours: nn.Module, args: Any, dtype: torch.dtype) -> None:
    """Outputs and gradients of one call of both."""
    agreement = Agreement(dtype)
    agreement.add(theirs, ours, args)
    agreement.check()


def assert_close(got: Tensor, truth: Tensor, references: Sequence[Tensor], what: str) -> None:
    """The rule of :mod:`fastseq.testing`, with the least exact of the references as the yardstick."""
    yardstick = max(references, key=lambda reference: (reference.double() - truth).norm().item())
    comparison = _compare(what, got, yardstick, truth)
    assert comparison.ok, str(comparison)


def assert_same(got: Any, expected: Any) -> None:
    """Equal but for rounding, in float64: what is compared is the same arithmetic, done in another layout or batch."""
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert one.dtype == other.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
