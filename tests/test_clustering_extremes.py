"""The DEC operations at the ends of their sizes: many centres, many features, one centre, and more points than fit q.

What is slow is in the full tier, and has a small sibling in the quick one.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from clustering_cases import Case, draws_of, inputs_of

from fastseq import functional as F
from fastseq.testing import assert_matches_reference

OPS = ["student_t_assignment", "target_distribution", "clustering_loss", "clustering_loss(freq)", "nearest_center"]
QUICK = [Case(32, 2, 5_000), Case(3, 4096, 3), Case(40, 2, 1), Case(40, 2, 1, alpha=30)]
FULL = [
    Case(40, 2, 100_000),
    Case(9, 3, 100_000, alpha=2),
    Case(40, 4096, 5),
    Case(33, 4096, 2, alpha=5),
    Case(5, 4096, 700),
    Case(5000, 4096, 1),
    Case(1, 1, 100_000, kind="tight"),
]


@pytest.mark.parametrize("given_as", OPS)
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str)
def test_ends_of_the_sizes(case: Case, given_as: str, backend: str, seed: int) -> None:
    # Where there is much to do for a draw, of so many that dz and dcenters have 256 numbers. A loss is one number, and
    # at these sizes its error is not that of storing it, to which the bound allows something: it takes more of them.
    work = case.N * case.K * case.d
    if work < 1e4:
        draws = draws_of(case, torch.float32, given_as)
    else:
        least = 2 if "loss" not in given_as else 32 if work < 1e6 else 8
        count = max(least, math.ceil(256 / (min(case.N, case.K) * case.d)))
        draws = [inputs_of(case, torch.float32, given_as) for _ in range(count)]
    assert_matches_reference(given_as.partition("(")[0], draws, implementation=backend, seed=seed)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_one_centre_has_everything(alpha: float, backend: str, seed: int) -> None:
    """With K = 1 every q and p is exactly 1, so the loss and both gradients are exactly 0."""
    z, centers = torch.randn(70, 5, requires_grad=True), torch.randn(1, 5, requires_grad=True)
    q = F.student_t_assignment(z, centers, alpha)
    assert torch.equal(q, torch.ones(70, 1))
    assert torch.equal(F.target_distribution(q.detach()), torch.ones(70, 1))
    for given in ({"target": torch.ones(70, 1)}, {"freq": torch.tensor([70.0])}):
        loss = F.clustering_loss(z, centers, alpha=alpha, **given)
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, (z, centers)):
            assert torch.equal(grad, torch.zeros_like(grad))


# In a process whose address space may grow by no more than `allowed` bytes once everything is loaded and has run: q
# alone would take several times as much.
STREAM = """
import json, resource, sys
from pathlib import Path
import torch
from fastseq import functional as F

points, batch, K, d, allowed = map(int, sys.argv[1:])
centers = torch.randn(K, d, generator=torch.Generator().manual_seed(1)).requires_grad_()

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(points // batch):
        yield torch.randn(batch, d, generator=generator)

def train(parts, freq):
    "The sums of the loss and of both gradients, that of dz of its squares."
    loss, squares, dcenters = 0.0, 0.0, torch.zeros(K, d, dtype=torch.float64)
    for z in parts:
        value = F.clustering_loss(z.requires_grad_(), centers, freq=freq)
        gradient, own = torch.autograd.grad(value, (z, centers))
        loss += value.item()
        squares += sum(part.double().square().sum().item() for part in gradient.split(100_000))
        dcenters += own
    return loss, squares, dcenters

train([torch.randn(2 * 1024, d)], torch.ones(K))  # threads, code and the allocators' arenas
F.accumulate_frequencies([torch.randn(2, d)], centers)
taken = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken + allowed, taken + allowed))

freq = F.accumulate_frequencies(batches(), centers)
streamed = train(batches(), freq)
z = torch.empty(points, d)
for part, made in zip(z.split(batch), batches()):
    part.copy_(made)
whole = train([z], freq)
print(json.dumps({
    "mass": freq.sum().item(),
    "losses": [streamed[0], whole[0]],
    "squares": [streamed[1], whole[1]],
    "apart": ((streamed[2] - whole[2]).abs().max() / whole[2].abs().max()).item(),
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process")
@pytest.mark.parametrize(
    ("points", "batch", "K", "d"),
    [(160_000, 20_000, 1000, 2), pytest.param(10_000_000, 100_000, 1000, 8, marks=pytest.mark.full)],
)
def test_more_points_than_q_has_room(points: int, batch: int, K: int, d: int) -> None:
    """Frequencies, loss and gradients of N points in minibatches and in one pass, with nothing of size N·K."""
    allowed = 3 * points * d * 4 + (192 << 20)  # z, its gradient and a copy, and what does not hang on N
    assert allowed < points * K * 4 / 3
    done = subprocess.run(
        [sys.executable, "-c", STREAM, *map(str, (points, batch, K, d, allowed))],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mass"] == pytest.approx(points, rel=1e-6)
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5)
    assert found["squares"][1] == pytest.approx(found["squares"][0], rel=1e-5)
    assert found["apart"] < 1e-4
