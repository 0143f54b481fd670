"""Random points and centres for the tests of clustering, and the shapes that between them meet every corner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from recurrence_cases import strided_copy
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes and options.

    ``kind`` is "plain", "far" (from the origin), "tight" (clusters, far apart) or "wide" (far from every centre).
    """

    N: int
    d: int
    K: int
    alpha: float = 1.0
    kind: str = "plain"
    strided: bool = False

    def __str__(self) -> str:
        parts = [f"N{self.N}d{self.d}K{self.K}"]
        parts += [f"alpha{self.alpha:g}"] if self.alpha != 1 else []
        parts += [self.kind] if self.kind != "plain" else []
        return "-".join(parts + ["strided"] * self.strided)


CASES = [
    Case(1, 1, 1),
    Case(1, 1, 1, alpha=2),
    Case(1, 5, 3, strided=True),
    Case(63, 10, 10),
    Case(65, 1, 17, alpha=0.5),
    Case(130, 33, 5, alpha=5, strided=True),
    Case(64, 16, 66),
    Case(300, 7, 33, alpha=2),
    Case(1100, 3, 4),
    Case(70, 130, 35),
    Case(20, 300, 39, alpha=0.5),
    Case(129, 65, 1),
    Case(130, 10, 10, kind="far"),
    Case(130, 40, 33, kind="far", alpha=5),
    Case(200, 9, 12, kind="tight"),
    Case(200, 34, 20, kind="tight", alpha=2, strided=True),
]


def points_and_centers(case: Case) -> tuple[Tensor, Tensor]:
    """In float64, all numbers bounded: an outlier now and then would decide a whole test by itself."""

    def random(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, dtype=torch.float64) - 1

    scale = min(1.0, 2 / case.d**0.5)  # else all distances would be nearly the same where d is large
    centers = scale * random(case.K, case.d)
    if case.kind == "plain":
        return scale * random(case.N, case.d), centers
    if case.kind == "wide":
        # So far from every centre that u would underflow where alpha is large. The centres are apart as seen from
        # there: else all distances round to one number, and the reference is right by luck.
        return 1e8 * random(case.N, case.d), 1e6 * centers
    # 1e-2 from a centre; "far": 1e4 from the origin too, "tight": the centres 10 apart, but 3 where alpha is large.
    # There q falls off exponentially, and float64 would no longer tell the nearest centre's q from 1: its gradient and
    # the loss, made of 1 - q, would be wrong in the truth itself.
    centers = 1e4 + 0.1 * centers if case.kind == "far" else (10 if case.alpha <= 5 else 3) * centers
    chosen = centers[torch.randint(case.K, (case.N,))]
    return chosen + 1e-2 * random(case.N, case.d) / case.d**0.5, centers


def freq_of(case: Case) -> Tensor:
    """Frequencies in float64, for points that are part of a larger whole."""
    return (case.N / case.K) * (0.5 + torch.rand(case.K, dtype=torch.float64))


def inputs_of(case: Case, dtype: torch.dtype, op: str = "student_t_assignment") -> dict[str, Any]:
    """Arguments of an operation by name. "clustering_loss" has a target, "clustering_loss(freq)" frequencies."""
    made_of: Callable[[Tensor], Tensor] = (
        (lambda value: strided_copy(value.to(dtype))) if case.strided else (lambda value: value.to(dtype))
    )
    if op == "target_distribution":
        return {"q": made_of(torch.rand(case.N, case.K, dtype=torch.float64).add(0.01).softmax(-1))}
    z, centers = (made_of(value) for value in points_and_centers(case))
    if op == "nearest_center":
        return {"z": z, "centers": centers}
    if op == "student_t_assignment":
        return {"z": z, "centers": centers, "alpha": case.alpha}
    options = {"alpha": case.alpha, "reduction": "batchmean" if case.N % 2 else "sum"}
    if op == "clustering_loss(freq)":
        return {"z": z, "centers": centers, "freq": freq_of(case).to(dtype), **options}
    target = torch.rand(case.N, case.K, dtype=torch.float64) ** 4 * (torch.rand(case.N, case.K) < 0.8)
    return {"z": z, "centers": centers, "target": made_of(target / (0.1 + target.sum(-1, keepdim=True))), **options}


def draws_of(case: Case, dtype: torch.dtype, op: str) -> list[dict[str, Any]]:
    """Several draws, which are judged together: so many that no tensor but the loss has fewer than 256 numbers."""
    first = inputs_of(case, dtype, op)
    smallest = min(value.numel() for value in first.values() if isinstance(value, Tensor))
    return [inputs_of(case, dtype, op) for _ in range(max(4, -(-256 // smallest)))]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Half types cannot hold points that are far from the origin and near to a centre. In float64 the reference itself is
# the truth and there is no yardstick: where distances or their powers nearly cancel, its own digits are lost too.
KINDS = {
    torch.float32: ("plain", "far", "tight"),
    torch.float64: ("plain",),
    torch.bfloat16: ("plain",),
    torch.float16: ("plain",),
}


def combinations() -> Iterator[Any]:
    """Every case in float32, and some in the other dtypes; the rest of them in the full tier."""
    for index, case in enumerate(CASES):
        for offset, dtype in enumerate(DTYPES):
            if case.kind in KINDS[dtype]:
                quick = dtype == torch.float32 or (index + offset) % 4 == 0
                yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=() if quick else pytest.mark.full)


COMBINATIONS = list(combinations())
