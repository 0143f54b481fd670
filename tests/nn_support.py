"""What the tests of the modules share: twins of torch's and fastseq's modules, and their comparison."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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

# A tensor is judged over at least so many draws, and over so many numbers in all of them together. In float64, where
# the bound does not hang on the luck of a yardstick, the first suffices, and half of it.
DRAWS, NUMBERS = 16, 256

# torch's module, fastseq's with the same weights, and the arguments that both are called with.
Draw = tuple[nn.Module, nn.Module, tuple[Any, ...]]


def twins(torch_class: type[nn.Module], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch's module with new random weights, and fastseq's with the same."""
    theirs, ours = torch_class(*args, **kwargs), TWINS[torch_class](*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def uniform(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers from (-1, 1), with gradient. Bounded: an outlier now and then would decide a whole test."""
    return (2 * torch.rand(shape, dtype=torch.float64) - 1).to(dtype).requires_grad_()


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


def run(module: nn.Module, args: tuple[Any, ...], call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Outputs of ``call(module, *args)``, and the gradients of one loss by arguments and parameters, by name.

    A leaf that received no gradient shows zeros.
    """
    outputs = {
        f"output {index}": each for index, each in enumerate(tensors((call or nn.Module.__call__)(module, *args)))
    }
    leaves = {f"argument {index}": leaf for index, leaf in enumerate(tensors(args)) if leaf.requires_grad}
    leaves |= dict(module.named_parameters())
    used = [output for output in outputs.values() if output.numel()]
    generator = torch.Generator().manual_seed(5)
    # Numbers that differ, so that no error hides in a sum; small integers, exact in every dtype.
    arriving = [torch.randint(1, 17, output.shape, generator=generator).to(output.dtype) for output in used]
    found = torch.autograd.grad(used, list(leaves.values()), arriving, materialize_grads=True)
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_twins_agree(
    draw: Callable[[], Draw],
    dtype: torch.dtype,
    *,
    their_call: Callable[..., Any] | None = None,
    our_call: Callable[..., Any] | None = None,
) -> None:
    """Holds each output and gradient of fastseq's module in dtype, by itself, to the rule of :mod:`fastseq.testing`.

    The truth is torch's module in float64. A tensor is judged over several draws put together, at least
    :data:`DRAWS` and so many that it has :data:`NUMBERS` elements: one of a few numbers may be right by luck in the
    reference, and luck is no standard.

    Args:
        draw: makes modules and arguments, in dtype, from torch's generator; the same each time but for the numbers.
        dtype: of ours, and of the reference that is its yardstick.
        their_call: what is compared, as ``their_call(module, *args)``; by default the call of the module.
        our_call: likewise for ours.
    """
    got: list[dict[str, Tensor]] = []
    ref: list[dict[str, Tensor]] = []
    truth: list[dict[str, Tensor]] = []
    draws = 1
    while len(truth) < draws:
        theirs, ours, args = draw()
        wide = copy.deepcopy(theirs).double(), to_dtype(args, torch.float64)
        seed = len(truth)
        truth.append(_run_from(seed, *wide, their_call))
        got.append(_run_from(seed, ours, to_dtype(args, dtype), our_call))
        if dtype == torch.float64:  # where the rule needs no yardstick
            ref.append(truth[-1])
        else:
            with fastseq.testing.use_implementation("reference"):
                ref.append(_run_from(seed, ours, to_dtype(args, dtype), our_call))
        smallest = min(each.numel() for each in truth[0].values())
        draws = DRAWS // 2 if dtype == torch.float64 else max(DRAWS, math.ceil(NUMBERS / smallest))
    for name in truth[0]:
        assert_close(name, *(torch.stack([each[name] for each in side]) for side in (got, ref, truth)))


def _run_from(seed: int, *args: Any) -> dict[str, Tensor]:
    """:func:`run`, under a seed of its own for dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run(*args)


def assert_close(name: str, got: Tensor, ref: Tensor, truth: Tensor) -> None:
    """The rule of :mod:`fastseq.testing` for one tensor."""
    comparison = compare_tensor(name, got, ref, truth)
    assert comparison.ok, str(comparison)


def assert_same(got: Any, expected: Any) -> None:
    """Equal but for rounding, in float64: what is compared is the same arithmetic, done in another layout or batch."""
    for index, (one, other) in enumerate(zip(tensors(got), tensors(expected), strict=True)):
        assert other.dtype == torch.float64
        assert_close(f"tensor {index}", one, other, other)
