"""Comparing an implementation with the float64 reference, by one rule.

For every tensor, output or gradient, with ``truth`` the reference in float64 and ``ref`` the reference in the dtype at
hand:

    max|got - truth|  <=  2 (max|ref - truth| + eps max|truth|) + the smallest normal number

and in float64 itself ``64 eps max|truth|`` plus that. A kernel may so be twice as wrong as plain PyTorch in the same
dtype, and no more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastseq import functional, reference
from fastseq.ops import dispatch

__all__ = [
    "Comparison",
    "assert_matches_reference",
    "compare",
    "compare_tensor",
    "implementations",
    "use_implementation",
]


@dataclass(frozen=True)
class Comparison:
    """One tensor held against the truth. ``error`` and ``allowed`` are absolute, in the units of the tensor."""

    name: str
    error: float
    allowed: float
    ok: bool

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g}{'' if self.ok else '  MISMATCH'}"


@dataclass(frozen=True)
class _Op:
    function: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    states: tuple[str, ...] = ()  # further outputs with return_states


def _alone(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda **inputs: (function(**inputs),)


def _nearest(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """Labels may differ where two centres are equally near but for rounding: how far they are must not."""

    def run(z: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
        labels, squared_distance = function(z, centers)
        return squared_distance, (z - centers[labels]).square().sum(-1)

    return run


_OPS = {
    "lstm": _Op(functional.lstm, reference.lstm, ("y", "h_n", "c_n"), ("c", "gates")),
    "rnn": _Op(functional.rnn, reference.rnn, ("y", "h_n")),
    "student_t_assignment": _Op(
        _alone(functional.student_t_assignment), _alone(reference.student_t_assignment), ("q",)
    ),
    "target_distribution": _Op(_alone(functional.target_distribution), _alone(reference.target_distribution), ("p",)),
    "clustering_loss": _Op(_alone(functional.clustering_loss), _alone(reference.clustering_loss), ("loss",)),
    "nearest_center": _Op(
        _nearest(functional.nearest_center), _nearest(reference.nearest_center), ("squared_distance", "to_label")
    ),
}


def implementations(op: str, device: str = "cpu", options: Sequence[str] = ()) -> list[str]:
    """The implementations of ``op`` ("lstm", "rnn") that can run on ``device`` here, as ``["reference", "cpp"]``.

    With ``options``, such as ``["zoneout"]`` (``fastseq.info()`` names them), those that serve them all.
    """
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {op!r}")
    kind = torch.device(device).type
    return [name for name in dispatch.IMPLEMENTATIONS if dispatch.why_not(name, kind, op, options) is None]


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Force one implementation (as ``FASTSEQ_IMPL`` does) inside the ``with`` block.

    Raises:
        RuntimeError: it cannot serve here; the message says why.
    """
    with dispatch.use(name):
        yield


def compare(
    op: str,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    implementation: str,
    dtype: torch.dtype | None = None,
    grads: bool = True,
    used: Collection[str] | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Runs ``op`` by one implementation and compares every output, and every gradient, with the float64 reference.

    Args:
        op: "lstm" or "rnn".
        inputs: the arguments of the function in :mod:`fastseq.functional`, by name. A floating input that requires no
            gradient gets one all the same when ``grads`` is true. Or several such draws of one shape, which are judged
            together: in a tensor of a few numbers the reference may be right by luck, and luck is no standard.
        implementation: one of :func:`implementations`.
        dtype: floating inputs are rounded to it first (default: left as they are). The truth starts from the rounded
            values.
        grads: whether to compare gradients too. The gradients that arrive are drawn from (-1, 1).
        used: the outputs at which a gradient arrives (default: all), as ``{"y"}``. At the others none does.
        seed: of those random gradients.

    Returns:
        One comparison per tensor: the outputs by their names, then the gradients as ``d<input>``, or ``d<input>[0]``, …
        for an input that is a tuple.
    """
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {op!r}")
    entry = _OPS[op]
    draws = [inputs] if isinstance(inputs, Mapping) else inputs
    outputs = entry.outputs + (entry.states if draws[0].get("return_states") else ())
    used = (outputs if used is None else used) if grads else ()
    got, ref, truth = [], [], []
    for index, draw in enumerate(draws):
        given = {name: _rounded(value, dtype) for name, value in draw.items()}
        wide = {name: _rounded(value, torch.float64) for name, value in given.items()}
        here = next(value.dtype for value in given.values() if _differentiable(value))
        options = outputs, used, seed + index, here
        truth.append(_results(entry.reference, wide, *options))
        ref.append(truth[-1] if here == torch.float64 else _results(entry.reference, given, *options))
        with use_implementation(implementation):
            got.append(_results(entry.function, given, *options))
    return [
        compare_tensor(name, *(torch.stack([each[name] for each in one]) for one in (got, ref, truth)))
        for name in truth[0]
    ]


def compare_tensor(name: str, got: Tensor, ref: Tensor, truth: Tensor) -> Comparison:
    """Holds one tensor to the rule of this module; :func:`compare` does it for every tensor of an operation.

    Several draws are judged together when they come stacked, in the same order in all three.

    Args:
        name: what the tensor is called in the :class:`Comparison`.
        got: the tensor to judge, of any shape.
        ref: the same from plain PyTorch in the same dtype, whose error is the yardstick. In float64 it is not read:
            the bound is absolute there.
        truth: the same in float64.

    Returns:
        Its largest error, the error that the rule allows, and whether it is kept. NaN and infinity break it; a tensor
        without elements keeps it.

    Raises:
        AssertionError: the shape of ``got`` is not that of ``truth``, or its dtype not that of ``ref``.
    """
    if got.shape != truth.shape or got.dtype != ref.dtype:
        raise AssertionError(
            f"{name}: expected shape {list(truth.shape)} and {ref.dtype}, got {list(got.shape)} and {got.dtype}"
        )
    if truth.numel() == 0:
        return Comparison(name, 0.0, 0.0, True)
    limits = torch.finfo(got.dtype)
    largest = truth.abs().max().item()
    if got.dtype == torch.float64:
        allowed = 64 * limits.eps * largest + limits.tiny
    else:
        allowed = 2 * ((ref.double() - truth).abs().max().item() + limits.eps * largest) + limits.tiny
    error = (got.double() - truth).abs().max().item()
    return Comparison(name, error, allowed, math.isfinite(error) and error <= allowed)


def assert_matches_reference(
    op: str,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    implementation: str,
    dtype: torch.dtype | None = None,
    grads: bool = True,
    used: Collection[str] | None = None,
    seed: int = 0,
) -> None:
    """:func:`compare`, raising an AssertionError that lists every mismatch."""
    results = compare(op, inputs, implementation=implementation, dtype=dtype, grads=grads, used=used, seed=seed)
    wrong = [str(result) for result in results if not result.ok]
    if wrong:
        raise AssertionError(f"{op} by {implementation} does not match the float64 reference:\n  " + "\n  ".join(wrong))


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _rounded(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, tuple):
        return tuple(_rounded(each, dtype) for each in value)
    return value.detach().to(dtype or value.dtype) if _differentiable(value) else value


def _results(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Mapping[str, Any],
    outputs: tuple[str, ...],
    used: Collection[str],
    seed: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Outputs and gradients by name. The gradients that arrive are the same numbers each time: those of ``dtype``."""
    asked: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(f"{name}[{index}]", each) for index, each in enumerate(value))
        if not _differentiable(value):
            return value
        asked[name] = value.detach().requires_grad_(bool(used))
        return asked[name]

    values = dict(zip(outputs, function(**{name: leaf(name, value) for name, value in inputs.items()}), strict=True))
    results = {name: value.detach() for name, value in values.items()}
    if used:
        generator = torch.Generator().manual_seed(seed)
        arriving = {
            name: (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1).to(dtype)
            for name, value in values.items()
        }
        found = torch.autograd.grad(
            [values[name] for name in used],
            list(asked.values()),
            [arriving[name].to(values[name]) for name in used],
            materialize_grads=True,
        )
        results |= {f"d{name}": grad for name, grad in zip(asked, found, strict=True)}
    return results
