"""target_distribution and accumulate_frequencies: against the float64 reference, the formula, and two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clustering_cases import CASES, Case, draws_of, freq_of, inputs_of
from torch import Tensor

from fastseq import cpu, reference
from fastseq import functional as F
from fastseq.testing import assert_matches_reference, implementations, use_implementation

OP = "target_distribution"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_cpp_kernels_run_here() -> None:
    assert implementations(OP) == ["reference", "cpp"], cpu.why_unavailable()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("freq", [False, True], ids=["", "freq"])
@pytest.mark.parametrize("case", [case for case in CASES if case.kind == "plain"], ids=str)
def test_target_and_gradients(case: Case, freq: bool, dtype: torch.dtype, backend: str, seed: int) -> None:
    draws = draws_of(case, dtype, OP)
    for draw in draws:
        if freq:
            draw["freq"] = freq_of(case).to(dtype)
    assert_matches_reference(OP, draws, implementation=backend, seed=seed)


def test_many_rows(backend: str, seed: int) -> None:
    draws = [inputs_of(Case(20_001, 1, 9), torch.float32, OP) for _ in range(4)]
    assert_matches_reference(OP, draws, implementation=backend, seed=seed)


def test_reference_is_the_formula(seed: int) -> None:
    q = torch.rand(7, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    p = reference.target_distribution(q)
    by_loops = torch.empty_like(p)
    for i in range(7):
        for j in range(5):
            weights = [q[i, k] ** 2 / sum(q[m, k] for m in range(7)) for k in range(5)]
            by_loops[i, j] = weights[j] / sum(weights)
    torch.testing.assert_close(p.detach(), by_loops.detach(), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(reference.target_distribution, (q,))
    freq = torch.rand(5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(reference.target_distribution, (q, freq))


@pytest.mark.parametrize("isa", cpu.isas())
def test_same_bits_for_any_number_of_threads(isa: str, seed: int) -> None:
    threads = torch.get_num_threads()
    inputs = inputs_of(Case(30_001, 1, 13), torch.float32, OP)
    with use_implementation("cpp"), cpu.use_isa(isa):
        try:
            torch.set_num_threads(1)
            first = F.target_distribution(**inputs)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(first, F.target_distribution(**inputs))
        finally:
            torch.set_num_threads(threads)


def test_no_points(backend: str) -> None:
    assert F.target_distribution(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": torch.randn(3)}, ValueError, r"q: expected shape \[N, K\]"),
        ({"q": torch.randn(3, 0)}, ValueError, "q: .* K of at least 1"),
        ({"q": torch.ones(3, 2, dtype=torch.int)}, TypeError, "q: expected one of the dtypes"),
        ({"freq": torch.ones(3)}, ValueError, r"freq: expected shape \[K\] = \[2\]"),
        ({"freq": torch.ones(2, dtype=torch.int)}, TypeError, "freq: expected a floating dtype"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.target_distribution(**{"q": torch.rand(3, 2)} | changes)


# Frequencies over a whole data set.


def whole_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(101, 3, generator=generator), torch.randn(6, 3, generator=generator)


def test_frequencies_are_streamed(backend: str) -> None:
    z, centers = whole_data()
    truth = reference.student_t_assignment(z.double(), centers.double(), 2.0).sum(0)
    freq = F.accumulate_frequencies(iter(z.split(13)), centers.requires_grad_(), alpha=2.0)
    assert freq.dtype == torch.float64
    assert not freq.requires_grad
    torch.testing.assert_close(freq, truth, rtol=1e-6, atol=0)


def rank_of_two(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    z, centers = whole_data()
    mine = z[:40] if rank == 0 else z[40:]
    freq = F.accumulate_frequencies(mine.split(7), centers, group=torch.distributed.group.WORLD)
    torch.save(freq, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_frequencies_are_summed_over_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    z, centers = whole_data()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, F.accumulate_frequencies([z], centers), rtol=1e-12, atol=0)
