"""nearest_center: every implementation against the float64 reference, ties, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clustering_cases import COMBINATIONS, KINDS, Case, draws_of, inputs_of
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastseq import cpu, reference
from fastseq import functional as F
from fastseq.testing import assert_matches_reference, implementations, use_implementation

OP = "nearest_center"


def test_cpp_kernels_run_here() -> None:
    assert implementations(OP) == ["reference", "cpp"], cpu.why_unavailable()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("case", "dtype"), [some for some in COMBINATIONS if some.values[0].alpha == 1])
def test_distances_and_gradients(case: Case, dtype: torch.dtype, backend: str, seed: int) -> None:
    # Gradients are compared where rounding cannot choose another centre.
    grads = dtype in (torch.float32, torch.float64)
    assert_matches_reference(OP, draws_of(case, dtype, OP), implementation=backend, seed=seed, grads=grads)


@settings(max_examples=20)
@given(
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 70), st.integers(1, 70)),
    data=st.sampled_from([(dtype, kind) for dtype in (torch.float32, torch.float64) for kind in KINDS[dtype]]),
    isa=st.sampled_from(cpu.isas()),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(sizes: tuple[int, int, int], data: tuple[torch.dtype, str], isa: str, seed: int) -> None:
    dtype, kind = data
    case = Case(*sizes, kind=kind)
    note(f"{case} {dtype} {isa}")
    torch.manual_seed(seed)
    with cpu.use_isa(isa):
        assert_matches_reference(OP, draws_of(case, dtype, OP), implementation="cpp", grads=False, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, backend: str, seed: int) -> None:
    z = torch.randint(-3, 4, (500, 3)).to(dtype)
    centers = torch.randint(-3, 4, (40, 3)).to(dtype)  # small integers: distances are exact
    labels, distance = F.nearest_center(z, centers)
    distances = (z[:, None] - centers).square().sum(-1)
    assert labels.dtype == torch.int64
    assert torch.equal(distance, distances.amin(-1))
    assert torch.equal(labels, (distances == distance[:, None]).int().argmax(-1))


def test_nan_counts_as_the_smallest(backend: str) -> None:
    z, centers = torch.randn(70, 3), torch.randn(9, 3)
    z[5, 1] = float("nan")
    z[7, 1] = float("inf")
    got, truth = F.nearest_center(z, centers), reference.nearest_center(z, centers)
    assert torch.equal(got[0], truth[0])
    assert got[1][5].isnan()
    assert got[1][7].isinf()
    centers[4, 0] = centers[6, 2] = float("nan")
    labels, distance = F.nearest_center(z[:3], centers)
    assert labels.tolist() == [4, 4, 4]
    assert distance.isnan().all()


@pytest.mark.parametrize("isa", cpu.isas())
def test_same_bits_for_any_number_of_threads(isa: str, seed: int) -> None:
    threads = torch.get_num_threads()
    inputs = inputs_of(Case(3001, 11, 13), torch.float32, OP)
    with use_implementation("cpp"), cpu.use_isa(isa):
        try:
            torch.set_num_threads(1)
            first = F.nearest_center(**inputs)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert all(torch.equal(a, b) for a, b in zip(first, F.nearest_center(**inputs), strict=True))
        finally:
            torch.set_num_threads(threads)


def test_no_points(backend: str) -> None:
    labels, distance = F.nearest_center(torch.empty(0, 3), torch.randn(4, 3))
    assert (labels.shape, distance.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"z": torch.randn(3)}, ValueError, r"z: expected shape \[N, d\]"),
        ({"centers": torch.randn(0, 4)}, ValueError, "centers: .* K of at least 1"),
        ({"centers": torch.randn(2, 5)}, ValueError, "centers: "),
        ({"centers": torch.randn(2, 4).double()}, TypeError, "centers: expected torch.float32"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.nearest_center(**{"z": torch.randn(3, 4), "centers": torch.randn(2, 4)} | changes)
