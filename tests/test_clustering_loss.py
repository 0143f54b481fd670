"""clustering_loss: every implementation against the float64 reference, and the reference against the formula."""

from __future__ import annotations

import subprocess
import sys
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

OP = "clustering_loss"
ALPHAS = [0.5, 1.0, 2.0, 5.0]


def test_cpp_kernels_run_here() -> None:
    assert implementations(OP) == ["reference", "cpp"], cpu.why_unavailable()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("given_as", [OP, f"{OP}(freq)"])
@pytest.mark.parametrize(("case", "dtype"), COMBINATIONS)
def test_loss_and_gradients(case: Case, given_as: str, dtype: torch.dtype, backend: str, seed: int) -> None:
    assert_matches_reference(OP, draws_of(case, dtype, given_as), implementation=backend, seed=seed)


@settings(max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 70), st.integers(1, 70)),
    alpha=st.sampled_from(ALPHAS) | st.floats(0.01, 1000),
    data=st.sampled_from([(dtype, kind) for dtype in (torch.float32, torch.float64) for kind in KINDS[dtype]]),
    given_as=st.sampled_from([OP, f"{OP}(freq)"]),
    isa=st.sampled_from(cpu.isas()),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(
    sizes: tuple[int, int, int], alpha: float, data: tuple[torch.dtype, str], given_as: str, isa: str, seed: int
) -> None:
    dtype, kind = data
    case = Case(*sizes, alpha=alpha, kind=kind)
    note(f"{case} {given_as} {dtype} {isa}")
    torch.manual_seed(seed)
    with cpu.use_isa(isa):
        assert_matches_reference(OP, draws_of(case, dtype, given_as), implementation="cpp", seed=seed)


@pytest.mark.full
@pytest.mark.parametrize("given_as", [OP, f"{OP}(freq)"])
@pytest.mark.parametrize(("N", "d", "K"), [(30, 4096, 3), (30, 2, 100_000), (9, 784, 1000), (20_000, 10, 10)])
def test_large(N: int, d: int, K: int, given_as: str, backend: str, seed: int) -> None:
    draws = [inputs_of(Case(N, d, K), torch.float32, given_as) for _ in range(8)]
    assert_matches_reference(OP, draws, implementation=backend, seed=seed)


@pytest.mark.parametrize("given_as", [OP, f"{OP}(freq)"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_far_from_every_centre(alpha: float, given_as: str, backend: str, seed: int) -> None:
    """Where every u underflows, the loss is right all the same. (Its gradient has no digits left there, for anyone.)"""
    for case in (Case(130, 6, 7, alpha, "wide"), Case(70, 40, 33, alpha, "wide")):
        draws = draws_of(case, torch.float32, given_as)
        assert_matches_reference(OP, draws, implementation=backend, grads=False)


def loss_and_gradients(inputs: dict[str, Any], function: Any = F.clustering_loss) -> list[Tensor]:
    z, centers = (inputs[name].detach().requires_grad_() for name in ("z", "centers"))
    loss = function(**inputs | {"z": z, "centers": centers})
    return [loss.detach(), *torch.autograd.grad(loss, (z, centers))]


def test_target_in_float32_beside_half_points(backend: str, seed: int) -> None:
    inputs = inputs_of(Case(130, 5, 6), torch.bfloat16, OP) | {"target": torch.rand(130, 6).softmax(-1)}
    got, truth = loss_and_gradients(inputs), loss_and_gradients(inputs, reference.clustering_loss)
    assert got[0].dtype == torch.float32
    for value, expected in zip(got, truth, strict=True):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected)


def test_small_gradients_do_not_underflow_in_half_types(backend: str, seed: int) -> None:
    """Scaled as a gradient scaler would, they are as good as those of the sum."""
    inputs = inputs_of(Case(4000, 3, 4), torch.float16, OP)
    z = inputs["z"].requires_grad_()
    (by_sum,) = torch.autograd.grad(F.clustering_loss(**inputs | {"reduction": "sum"}), z)
    (by_mean,) = torch.autograd.grad(4000 * F.clustering_loss(**inputs | {"reduction": "batchmean"}), z)
    torch.testing.assert_close(by_mean, by_sum, rtol=2e-3, atol=1e-6)


def test_target_is_held_constant(backend: str, seed: int) -> None:
    """A target that was not detached changes nothing: neither gradient."""
    z, centers = (torch.randn(n, 3, requires_grad=True) for n in (70, 5))
    p = F.target_distribution(F.student_t_assignment(z, centers))
    assert p.requires_grad
    attached = torch.autograd.grad(F.clustering_loss(z, centers, p), (z, centers))
    detached = torch.autograd.grad(F.clustering_loss(z, centers, p.detach()), (z, centers))
    assert all(torch.equal(a, b) for a, b in zip(attached, detached, strict=True))


def test_frequencies_are_the_target_they_make(backend: str, seed: int) -> None:
    z, centers = torch.randn(300, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    freq = F.accumulate_frequencies([z], centers, alpha=2.0)
    target = F.target_distribution(F.student_t_assignment(z, centers, 2.0), freq)
    options = {"z": z, "centers": centers, "alpha": 2.0}
    by_freq, by_target = loss_and_gradients(options | {"freq": freq}), loss_and_gradients(options | {"target": target})
    for got, truth in zip(by_freq, by_target, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-13)


def test_gradients_can_be_scaled_kept_and_taken_one_by_one(backend: str, seed: int) -> None:
    inputs = inputs_of(Case(130, 5, 6), torch.float32, OP)
    _, dz, dcenters = loss_and_gradients(inputs)
    z, centers = (inputs[name].requires_grad_() for name in ("z", "centers"))
    loss = F.clustering_loss(**inputs)
    kept = torch.autograd.grad(loss, (z, centers), retain_graph=True)
    kept[0].zero_()  # whatever the caller does with it, the graph is unharmed
    again = torch.autograd.grad(3 * loss, (z, centers))
    torch.testing.assert_close(again, (3 * dz, 3 * dcenters))
    (alone,) = torch.autograd.grad(F.clustering_loss(**inputs | {"centers": centers.detach()}), z)
    assert torch.equal(alone, dz)
    (alone,) = torch.autograd.grad(F.clustering_loss(**inputs | {"z": z.detach()}), centers)
    assert torch.equal(alone, dcenters)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.isas())
def test_same_bits_on_every_run_and_for_any_number_of_threads(isa: str, dtype: torch.dtype, seed: int) -> None:
    threads = torch.get_num_threads()
    with use_implementation("cpp"), cpu.use_isa(isa):
        for case in (Case(3001, 11, 13), Case(800, 33, 40, alpha=2.0)):
            for given_as in (OP, f"{OP}(freq)"):
                inputs = inputs_of(case, dtype, given_as)
                try:
                    torch.set_num_threads(1)
                    first = loss_and_gradients(inputs)
                    for count in (1, 2, 3, 5):
                        torch.set_num_threads(count)
                        again = loss_and_gradients(inputs)
                        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{case}, {count}"
                finally:
                    torch.set_num_threads(threads)


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_no_points(reduction: str, backend: str) -> None:
    centers = torch.randn(4, 3, requires_grad=True)
    loss = F.clustering_loss(torch.empty(0, 3), centers, torch.empty(0, 4), reduction=reduction)
    expected = torch.nn.functional.kl_div(torch.empty(0, 4), torch.empty(0, 4), reduction=reduction)
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
    if reduction == "sum":
        assert torch.equal(torch.autograd.grad(loss, centers)[0], torch.zeros(4, 3))


@pytest.mark.parametrize("given_as", [OP, f"{OP}(freq)"])
def test_nan_is_carried_through(given_as: str, backend: str) -> None:
    inputs = inputs_of(Case(70, 3, 4), torch.float32, given_as)
    inputs["z"][5, 1] = float("nan")
    loss, dz, dcenters = loss_and_gradients(inputs)
    assert loss.isnan()
    assert dz.isnan().any(-1).nonzero().flatten().tolist() == [5]
    assert dcenters.isnan().all()


def test_memory_of_a_step() -> None:
    """Beside inputs and gradients a step holds less than 30 MB: q would be 205 MB, z - mu 6.5 GB."""
    code = """
import resource, sys, torch
from fastseq import functional as F
z, c = torch.rand(200_000, 32, requires_grad=True), torch.rand(256, 32, requires_grad=True)
freq = torch.full((256,), 800.0) if sys.argv[1] == "freq" else None
target = torch.full((200_000, 256), 1 / 256) if freq is None else None
small = target if target is None else target[:100]
torch.autograd.grad(F.clustering_loss(z[:100], c, small, freq=freq), (z, c))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.autograd.grad(F.clustering_loss(z, c, target, freq=freq), (z, c))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    gradients = 200_000 * 32 * 4 / 1024
    for given_as in ("target", "freq"):
        done = subprocess.run([sys.executable, "-c", code, given_as], capture_output=True, text=True, check=True)
        assert int(done.stdout) < gradients + 30 * 1024


# The reference itself.


def direct(z: Tensor, centers: Tensor, p: Tensor, alpha: float) -> Tensor:
    numerator = (1 + torch.cdist(z, centers) ** 2 / alpha) ** (-(alpha + 1) / 2)
    q = numerator / numerator.sum(-1, keepdim=True)
    return torch.nn.functional.kl_div(q.log(), p, reduction="sum")


def by_hand(z: Tensor, centers: Tensor, p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The gradients of Xie et al. 2016, eqs. 4 and 5, for any mass of the rows of p."""
    q = reference.student_t_assignment(z, centers, alpha)
    difference = z[:, None] - centers  # [N, K, d]
    slope = 1 / (1 + difference.square().sum(-1) / alpha)
    summand = (alpha + 1) / alpha * (slope * (p - q * p.sum(-1, keepdim=True)))[..., None] * difference
    return summand.sum(1), -summand.sum(0)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_reference_is_the_formula(alpha: float, normalized: bool, seed: int) -> None:
    z, centers = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    p = torch.rand(7, 5, dtype=torch.float64)
    p[2, 3] = 0
    p = p / p.sum(-1, keepdim=True) if normalized else p
    truth = direct(z, centers, p, alpha)
    got = reference.clustering_loss(z, centers, p, alpha=alpha)
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-13)
    grads = torch.autograd.grad(got, (z, centers))
    for other in (torch.autograd.grad(truth, (z, centers)), by_hand(z, centers, p, alpha)):
        torch.testing.assert_close(grads, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reference_derivatives(alpha: float, seed: int) -> None:
    z, centers = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    p = torch.rand(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z, c: reference.clustering_loss(z, c, p, alpha=alpha), (z, centers))


# Bad input.


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"target": None}, TypeError, "either target or freq, got neither"),
        ({"freq": torch.ones(2)}, TypeError, "either target or freq, got both"),
        ({"target": torch.rand(3, 1)}, ValueError, r"target: expected shape \[N, K\] = \[3, 2\], got \[3, 1\]"),
        ({"target": torch.rand(3, 2).double()}, TypeError, "target: expected torch.float32, the dtype of z"),
        ({"target": [1]}, TypeError, "target: expected a Tensor or None"),
        ({"target": None, "freq": torch.ones(3)}, ValueError, r"freq: expected shape \[K\] = \[2\]"),
        ({"target": None, "freq": torch.ones(2, dtype=torch.long)}, TypeError, "freq: expected a floating dtype"),
        ({"target": None, "freq": 1.0}, TypeError, "freq: expected a Tensor or None"),
        ({"reduction": "mean"}, ValueError, "reduction: expected one of sum, batchmean, got 'mean'"),
        ({"alpha": 0}, ValueError, "alpha: "),
        ({"centers": torch.randn(2, 3)}, ValueError, "centers: "),
        ({"centers": torch.randn(0, 4)}, ValueError, "centers: "),
        ({"target": torch.rand(3, 2), "validate": True}, ValueError, "target: expected rows whose sum is 1"),
        ({"target": torch.tensor([[2.0, -1]] * 3), "validate": True}, ValueError, "target: .* not negative"),
        ({"target": torch.full((3, 2), float("nan")), "validate": True}, ValueError, "target: "),
        ({"z": torch.full((3, 4), float("inf")), "validate": True}, ValueError, "z: expected finite numbers"),
        ({"target": None, "freq": torch.zeros(2), "validate": True}, ValueError, "freq: expected positive"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    good = {"z": torch.randn(3, 4), "centers": torch.randn(2, 4), "target": torch.full((3, 2), 0.5)}
    F.clustering_loss(**good, validate=True)
    with pytest.raises(error, match=words):
        F.clustering_loss(**good | changes)


def test_a_direct_call_cannot_read_beyond_a_tensor() -> None:
    fwd = torch.ops.fastseq.clustering_loss_fwd
    z, centers, target, freq = torch.randn(3, 4), torch.randn(2, 4), torch.rand(3, 2), torch.rand(2)
    with use_implementation("cpp"):
        for args in (
            (z, torch.randn(2, 3), target, None),
            (z, centers, target[:2], None),
            (z, centers, target.double(), None),
            (z, centers, None, freq[:1]),
            (z, centers, None, freq.double()),
            (z, centers, None, None),
            (z, centers, target, freq),
            (z, centers[:0], target[:, :0], None),
        ):
            with pytest.raises(ValueError, match=r"expects|at least"):
                fwd(*args, 1.0, "sum", 3)
