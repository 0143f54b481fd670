"""student_t_assignment: every implementation against the float64 reference, and the reference against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clustering_cases import COMBINATIONS, DTYPES, KINDS, Case, draws_of, inputs_of
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from fastseq import cpu, reference
from fastseq import functional as F
from fastseq.testing import assert_matches_reference, implementations, use_implementation

OP = "student_t_assignment"
ALPHAS = [0.5, 1.0, 2.0, 5.0]


def test_cpp_kernels_run_here() -> None:
    assert implementations(OP) == ["reference", "cpp"], cpu.why_unavailable()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("case", "dtype"), COMBINATIONS)
def test_assignment_and_gradients(case: Case, dtype: torch.dtype, backend: str, seed: int) -> None:
    assert_matches_reference(OP, draws_of(case, dtype, OP), implementation=backend, seed=seed)


@settings(max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 70), st.integers(1, 70)),
    alpha=st.sampled_from(ALPHAS) | st.floats(0.01, 1000),
    data=st.sampled_from([(dtype, kind) for dtype in (torch.float32, torch.float64) for kind in KINDS[dtype]]),
    isa=st.sampled_from(cpu.isas()),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(
    sizes: tuple[int, int, int], alpha: float, data: tuple[torch.dtype, str], isa: str, seed: int
) -> None:
    dtype, kind = data
    case = Case(*sizes, alpha=alpha, kind=kind)
    note(f"{case} {dtype} {isa}")
    torch.manual_seed(seed)
    with cpu.use_isa(isa):
        assert_matches_reference(OP, draws_of(case, dtype, OP), implementation="cpp", seed=seed)


@pytest.mark.full
@pytest.mark.parametrize(("d", "K"), [(4096, 3), (2, 100_000), (784, 1000)])
def test_large(d: int, K: int, backend: str, seed: int) -> None:
    case = Case(70, d, K) if d * K < 500_000 else Case(9, d, K)
    assert_matches_reference(OP, [inputs_of(case, torch.float32) for _ in range(2)], implementation=backend, seed=seed)


def test_no_points(backend: str) -> None:
    z, centers = torch.empty(0, 3), torch.randn(4, 3, requires_grad=True)
    q = F.student_t_assignment(z, centers)
    assert q.shape == (0, 4)
    (grad,) = torch.autograd.grad(q.sum(), centers)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_point_that_is_not_finite_spoils_its_row_alone(backend: str) -> None:
    z, centers = torch.randn(70, 3), torch.randn(4, 3)
    z[5, 1], z[66, 0] = float("nan"), float("inf")
    q = F.student_t_assignment(z, centers, 2.0)
    wrong = q.isnan().any(-1)
    assert wrong.nonzero().flatten().tolist() == [5, 66]
    assert q[wrong].isnan().all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_far_from_every_centre(alpha: float, backend: str, seed: int) -> None:
    """Where every u underflows, q is right all the same. (Its gradient has no digits left there, for anyone.)

    The kernels have q to a few units in the last place, which is more than the rule asks: the reference subtracts
    logarithms of a hundred.
    """
    for case in (Case(130, 6, 7, alpha, "wide"), Case(70, 40, 33, alpha, "wide")):
        draws = draws_of(case, torch.float32, OP)
        assert_matches_reference(OP, draws, implementation=backend, grads=False)
        for draw in draws if backend == "cpp" else []:
            z, centers = draw["z"], draw["centers"]
            truth = reference.student_t_assignment(z.double(), centers.double(), alpha)
            q = F.student_t_assignment(z, centers, alpha).double()
            torch.testing.assert_close(q, truth, rtol=16 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_have_the_sum_one_however_far(alpha: float, backend: str, seed: int) -> None:
    z = torch.randn(40, 6) * torch.logspace(-15, 15, 40)[:, None]
    q = F.student_t_assignment(z, torch.randn(9, 6), alpha)
    torch.testing.assert_close(q.sum(-1), torch.ones(40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.isas())
def test_same_bits_on_every_run_and_for_any_number_of_threads(isa: str, dtype: torch.dtype, seed: int) -> None:
    def run() -> list[Tensor]:
        z, centers = (given[name].detach().requires_grad_() for name in ("z", "centers"))
        q = F.student_t_assignment(z, centers, given["alpha"])
        return [q, *torch.autograd.grad((q * arriving).sum(), (z, centers))]

    threads = torch.get_num_threads()
    with use_implementation("cpp"), cpu.use_isa(isa):
        for case in (Case(3001, 11, 13), Case(800, 33, 40, alpha=2.0)):
            given = inputs_of(case, dtype)
            arriving = torch.randn(case.N, case.K, dtype=dtype)
            try:
                torch.set_num_threads(1)
                first = run()
                for count in (1, 2, 3, 5):
                    torch.set_num_threads(count)
                    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{case}, {count} threads"
            finally:
                torch.set_num_threads(threads)


# The reference itself.


def direct(z: Tensor, centers: Tensor, alpha: float) -> Tensor:
    """Equation 1 of Xie et al. 2016, as it is printed."""
    numerator = (1 + torch.cdist(z, centers) ** 2 / alpha) ** (-(alpha + 1) / 2)
    return numerator / numerator.sum(-1, keepdim=True)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reference_is_the_formula(alpha: float, seed: int) -> None:
    z, centers = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    arriving = torch.randn(7, 5, dtype=torch.float64)
    results: list[tuple[Any, ...]] = []
    for function in (direct, reference.student_t_assignment):
        q = function(z, centers, alpha)
        results.append((q, *torch.autograd.grad(q, (z, centers), arriving)))
    for truth, got in zip(*results, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reference_derivatives(alpha: float, seed: int) -> None:
    z, centers = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    assert torch.autograd.gradcheck(lambda z, c: reference.student_t_assignment(z, c, alpha), (z, centers))


# Bad input.


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"z": torch.randn(3)}, ValueError, r"z: expected shape \[N, d\]"),
        ({"z": torch.randn(3, 0), "centers": torch.randn(2, 0)}, ValueError, "z: expected .* d of at least 1"),
        ({"centers": torch.randn(0, 4)}, ValueError, "centers: .* K of at least 1, got"),
        ({"centers": torch.randn(2, 5)}, ValueError, r"centers: expected shape \[K, d\] = \[K, 4\]"),
        ({"centers": torch.randn(4)}, ValueError, "centers: "),
        ({"centers": torch.randn(2, 4).double()}, TypeError, "centers: expected torch.float32"),
        ({"z": torch.ones(3, 4, dtype=torch.long)}, TypeError, "z: expected one of the dtypes"),
        ({"z": [[1.0]]}, TypeError, "z: expected a Tensor"),
        ({"alpha": 0.0}, ValueError, "alpha: expected a positive finite number, got 0.0"),
        ({"alpha": -1}, ValueError, "alpha: "),
        ({"alpha": float("nan")}, ValueError, "alpha: "),
        ({"alpha": float("inf")}, ValueError, "alpha: "),
        ({"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
        ({"alpha": True}, TypeError, "alpha: expected a number, got bool"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.student_t_assignment(**{"z": torch.randn(3, 4), "centers": torch.randn(2, 4)} | changes)


def test_a_direct_call_cannot_read_beyond_a_tensor() -> None:
    fwd, bwd = torch.ops.fastseq.student_t_fwd, torch.ops.fastseq.student_t_bwd
    z, centers = torch.randn(3, 4), torch.randn(2, 4)
    with use_implementation("cpp"):
        for attempt in (
            lambda: fwd(z, torch.randn(2, 3), 1.0),
            lambda: fwd(z, centers.double(), 1.0),
            lambda: fwd(z, centers, 0.0),
            lambda: fwd(z, centers[:0], 1.0),
            lambda: bwd(torch.randn(3, 1), z, centers, 1.0, 3),
            lambda: bwd(torch.randn(3, 2).double(), z, centers, 1.0, 3),
        ):
            with pytest.raises(ValueError, match=r"expects|must be|at least"):
                attempt()
