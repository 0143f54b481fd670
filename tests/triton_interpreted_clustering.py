"""The Triton kernels of points and centres in Triton's interpreter, as ``triton_interpreted.py`` has the recurrences.

The interpreter takes a while for each launch, so instead of many draws of small tensors there are four of such sizes
that no tensor but the loss has fewer than 200 numbers, and 16 where there is a loss: of four numbers the reference may
have all right by luck.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clustering_cases import Case, inputs_of
from torch import Tensor

from fastseq import functional as F
from fastseq.kernels import clusters
from fastseq.kernels.clustering_loss import clustering_loss_fwd
from fastseq.kernels.nearest_center import nearest_center_fwd
from fastseq.testing import assert_matches_reference, use_implementation

OPS = ("clustering_loss", "clustering_loss(freq)", "student_t_assignment", "target_distribution", "nearest_center")
# Odd sizes that fill no tile, and several tiles of each dimension; K, N, d of one; far from the origin and near to a
# centre; clusters that are tight and far apart.
QUICK = [
    (Case(70, 12, 66, alpha=0.5), torch.float16),
    (Case(70, 20, 35, kind="far"), torch.float32),
    (Case(70, 66, 14, alpha=2, kind="tight", strided=True), torch.float32),
]
CORNERS = [
    Case(230, 1, 210),
    Case(210, 230, 1),
    Case(1, 230, 210),
    Case(210, 1, 1, alpha=2),
    Case(1, 210, 1),
    Case(70, 3, 300, alpha=5),
    Case(200, 130, 65, strided=True),
    Case(130, 40, 33, kind="far", alpha=5),
    Case(200, 34, 20, kind="tight", alpha=0.01),
]


def check(op: str, case: Case, dtype: torch.dtype, seed: int) -> None:
    name = op.partition("(")[0]
    draws = [inputs_of(case, dtype, op) for _ in range(16 if name == "clustering_loss" else 4)]
    assert_matches_reference(name, draws, implementation="triton", seed=seed)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several partial sums of the centres' gradient in each."""
    monkeypatch.setattr(clusters, "CHUNK_NUMBERS", 1)
    monkeypatch.setattr(clusters, "LEAST_POINTS", 64)
    monkeypatch.setattr(clusters, "SPAN_POINTS", 16)


@pytest.mark.usefixtures("poison", "small_chunks")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("case", "dtype"), QUICK, ids=str)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype, op: str, seed: int) -> None:
    if op not in ("target_distribution", "student_t_assignment") or case.kind != "far":
        check(op, case, dtype, seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CORNERS, ids=str)
def test_corners(case: Case, op: str, dtype: torch.dtype, seed: int) -> None:
    if dtype == torch.float32 or case.kind == "plain":
        check(op, case, dtype, seed)


@pytest.mark.full
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("N", "d", "K"), [(20, 4096, 3), (20, 2, 20_000), (3000, 3, 4)])
def test_large(N: int, d: int, K: int, op: str, seed: int) -> None:
    check(op, Case(N, d, K), torch.float32, seed)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_far_from_every_centre(alpha: float, seed: int) -> None:
    """Where every u underflows, the loss is right all the same."""
    draws = [inputs_of(Case(40, 6, 7, alpha, "wide"), torch.float32, "clustering_loss(freq)") for _ in range(16)]
    assert_matches_reference("clustering_loss", draws, implementation="triton", grads=False)


def test_one_centre_has_no_gradient_and_a_whole_assignment(seed: int) -> None:
    """Exactly: with K of 1 each q is 1, and where the target is too nothing pulls."""
    z, centers = torch.rand(40, 3), torch.rand(1, 3)
    with use_implementation("triton"):
        assert torch.equal(F.student_t_assignment(z, centers, 2.0), torch.ones(40, 1))
        assert torch.equal(F.target_distribution(torch.rand(40, 1)), torch.ones(40, 1))
    for alpha in (1.0, 0.3):
        for given in ((torch.ones(40, 1), None), (None, torch.tensor([7.0]))):
            loss, dz, dcenters = clustering_loss_fwd(z, centers, *given, alpha, "sum", 3)
            assert (loss.item(), dz.abs().max().item(), dcenters.abs().max().item()) == (0, 0, 0)


@pytest.mark.usefixtures("small_chunks")
def test_the_same_bits_whatever_is_asked_for(seed: int) -> None:
    """On every run, and with one gradient or both."""
    inputs = inputs_of(Case(150, 20, 18), torch.float32, "clustering_loss(freq)")
    z, centers, freq = (inputs[name] for name in ("z", "centers", "freq"))

    def run(needs: int) -> tuple[Tensor, ...]:
        return clustering_loss_fwd(z, centers, None, freq, 1.0, "batchmean", needs)

    both, again, points, middle, nothing = (run(needs) for needs in (3, 3, 1, 2, 0))
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    assert torch.equal(points[1], both[1])
    assert torch.equal(middle[2], both[2])
    assert [value.numel() for value in (points[2], middle[1], nothing[1], nothing[2])] == [0, 0, 0, 0]
    assert all(torch.equal(found[0], both[0]) for found in (points, middle, nothing))


def test_ties_go_to_the_lowest_and_nan_counts_as_smallest() -> None:
    z = torch.tensor([[0.0], [5.0], [float("nan")], [float("inf")]])
    centers = torch.tensor([[7.0], [1.0], [-1.0], [1.0], [3.0]]).repeat(20, 1)
    labels, distance = nearest_center_fwd(z, centers)
    assert labels.tolist() == [1, 0, 0, 0]
    assert distance[:2].tolist() == [1, 4]
    assert distance[2].isnan()
    assert distance[3].isinf()
    centers[66] = float("nan")  # in the second tile
    assert nearest_center_fwd(z[:2], centers)[0].tolist() == [66, 66]


def test_a_point_that_is_not_finite_spoils_its_row_alone(seed: int) -> None:
    z, centers = torch.rand(50, 3), torch.rand(7, 3)
    with use_implementation("triton"):
        whole = F.student_t_assignment(z, centers, 2.0)
        z[3, 1], z[40, 0] = float("nan"), float("inf")
        q = F.student_t_assignment(z, centers, 2.0)
        for given in ({"freq": torch.ones(7)}, {"target": torch.zeros(50, 7)}):
            assert F.clustering_loss(z, centers, **given).isnan()
    spoilt = torch.zeros(50, dtype=torch.bool).index_fill(0, torch.tensor([3, 40]), value=True)
    assert torch.equal(q.isnan().all(1), spoilt)
    assert torch.equal(q[~spoilt], whole[~spoilt])


def test_empty_and_refused() -> None:
    def call(dtype: torch.dtype, N: int) -> dict[str, Any]:
        z, centers = torch.rand(N, 3, dtype=dtype), torch.rand(2, 3, dtype=dtype)
        q = F.student_t_assignment(z, centers)
        found = {"q": q, "p": F.target_distribution(q), "loss": F.clustering_loss(z, centers, q)}
        return found | dict(zip(("labels", "distance"), F.nearest_center(z, centers), strict=True))

    with use_implementation("triton"):
        found = call(torch.float32, 0)
        assert (found["q"].shape, found["p"].shape, found["loss"].item(), found["labels"].shape) == ((0, 2),) * 2 + (
            0,
            (0,),
        )
        assert F.clustering_loss(torch.rand(0, 3), torch.rand(2, 3), found["q"], reduction="batchmean").isnan()
        with pytest.raises(RuntimeError, match="reference"):
            call(torch.float64, 4)
        with pytest.raises(RuntimeError, match="reference"):
            F.target_distribution(torch.rand(3, 2, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="reference"):
            F.nearest_center(torch.rand(3, 2).double(), torch.rand(3, 2).double())
    with pytest.raises(ValueError, match="centers: the kernel expects"):
        nearest_center_fwd(torch.rand(3, 2), torch.rand(3, 3))


def test_the_logarithm_is_exact_to_a_unit_in_the_last_place() -> None:
    """Everywhere, where Triton's own may be the hardware's, which has no digits near 1."""
    x = torch.cat([torch.logspace(-37, 38, 3001, dtype=torch.float64), 1 + torch.linspace(-1e-3, 1e-3, 3001)]).float()
    y = torch.cat([torch.logspace(-30, 38, 3001, dtype=torch.float64), torch.zeros(1)]).float()
    for function, values, truth in ((clusters.log, x, x.double().log()), (clusters.log1p, y, y.double().log1p())):
        got = logarithm_of(function, values)
        assert ((got.double() - truth).abs() <= 1.2e-7 * truth.abs() + 1e-38).all()


def logarithm_of(function: Any, values: Tensor) -> Tensor:
    made = torch.empty_like(values)
    apply[(1,)](values, made, values.numel(), FUNCTION=function, BLOCK=1 << (values.numel() - 1).bit_length())
    return made


import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def apply(x, y, N, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.arange(0, BLOCK)
    tl.store(y + n, FUNCTION(tl.load(x + n, mask=n < N, other=1.0)), mask=n < N)
