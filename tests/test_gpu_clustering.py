"""The Triton kernels of points and centres on a GPU: every tensor by the one tolerance rule, repeatability, streams.

``make gpu`` runs these on a machine that has one; elsewhere they are deselected.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from clustering_cases import CASES, Case, draws_of, inputs_of
from gpu_support import assert_same_bits_on_a_second_stream, on_gpu
from torch import Tensor

from fastseq import functional as F
from fastseq.testing import assert_matches_reference, use_implementation

pytestmark = pytest.mark.gpu
OPS = ("clustering_loss", "clustering_loss(freq)", "student_t_assignment", "target_distribution", "nearest_center")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MOST_DRAWS = 64  # of the smallest tensors


def check(op: str, case: Case, dtype: torch.dtype, seed: int) -> None:
    draws = [on_gpu(draw) for draw in draws_of(case, dtype, op)[:MOST_DRAWS]]
    assert_matches_reference(op.partition("(")[0], draws, implementation="triton", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_outputs_and_gradients(op: str, dtype: torch.dtype, seed: int) -> None:
    for case in CASES:
        if dtype == torch.float32 or case.kind == "plain":
            check(op, case, dtype, seed)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("N", "d", "K"), [(30, 4096, 3), (30, 2, 100_000), (9, 784, 1000), (20_000, 10, 10)])
def test_large(N: int, d: int, K: int, op: str, seed: int) -> None:
    check(op, Case(N, d, K), torch.float32, seed)


def test_a_hundred_random_shapes(seed: int) -> None:
    """All of what is compiled for is the tile of K and of d, and alpha of 1."""
    draw = random.Random(seed)
    for _ in range(100):
        case = Case(
            draw.randint(1, 500), draw.randint(1, 200), draw.randint(1, 300), alpha=draw.choice([0.3, 1.0, 5.0])
        )
        op = draw.choice(OPS)
        try:
            check(op, case, draw.choice(DTYPES), seed)
        except AssertionError as error:
            raise AssertionError(f"{case} {op}: {error}") from None


def results_of(inputs: dict[str, Any]) -> list[Tensor]:
    """The loss and both gradients."""
    z, centers = (inputs[name].detach().requires_grad_() for name in ("z", "centers"))
    with use_implementation("triton"):
        loss = F.clustering_loss(**inputs | {"z": z, "centers": centers})
        return [loss.detach(), *torch.autograd.grad(loss, (z, centers))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_run_and_stream(dtype: torch.dtype, seed: int) -> None:
    inputs = on_gpu(inputs_of(Case(50_000, 33, 200), dtype, "clustering_loss(freq)"))
    assert_same_bits_on_a_second_stream(lambda: results_of(inputs), times=3)


def test_more_numbers_than_32_bits_count(seed: int) -> None:
    """q has 2.4e9 numbers: its last rows are those of a call of their own."""
    z, centers = (torch.rand(n, 2, device="cuda", dtype=torch.float16) for n in (40_000, 60_000))
    with use_implementation("triton"), torch.no_grad():
        q = F.student_t_assignment(z, centers)
        assert torch.equal(q[-3:], F.student_t_assignment(z[-3:], centers))


def test_frequencies_hold_nothing_of_points_times_centers(seed: int) -> None:
    """A million points at a thousand centres, in less than a tenth of the memory of q."""
    inputs = on_gpu(inputs_of(Case(1_000_000, 8, 1000), torch.float32, "clustering_loss(freq)"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results_of(inputs)
    assert torch.cuda.max_memory_allocated() - before < 4e9 / 10
