"""The CUDA kernels in the emulator, forward and each gradient, against the float64 reference by the one tolerance rule.

It runs the kernels' own source, thread by thread of all blocks of a cluster; only the instructions are replaced. What a
correct kernel cannot tell is varied by the schedule: the order of the threads, and when copies and remote stores take
effect. Fresh shared memory is NaN, and a thread that waits for what never comes fails the test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_support import COMPILER, emulated, emulator, needs_launchers
from recurrence_cases import Case, draws_for, draws_of, enlarge, inputs_of
from torch import Tensor

from fastseq import functional as F
from fastseq.cuda import plan
from fastseq.ops import dispatch
from fastseq.testing import assert_matches_reference, use_implementation

pytestmark = [needs_launchers, pytest.mark.skipif(COMPILER is None, reason="needs g++")]

OPS = {"lstm": 4, "rnn": 1}
HALVES = [torch.bfloat16, torch.float16]
SCHEDULES = [0, 1, 2, 3, 4]  # the last at random; what the others are: csrc/cuda/emulated/machine.h
BUILDS = range(6)
# More tiles of the batch than the emulator has clusters for, edges in every dimension, more steps than the ring has.
CORNERS = [
    Case(7, 35, 3, 40, time="lengths+reset"),
    Case(6, 5, 4, 45, reverse=True),
    Case(9, 9, 4, 72, reverse=True, time="lengths+reset", bias="ih"),
]
SMALL = [Case(1, 1, 1, 1), Case(2, 3, 2, 9, time="reset", bias="none"), Case(6, 1, 3, 17, time="lengths")]


def check(op: str, given: Any, schedule: int, seed: int, **fields: Any) -> None:
    with emulated(schedule), plan.override(**fields):
        assert_matches_reference(op, given, implementation="cuda", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("build", BUILDS)
def test_every_build_of_the_cluster(build: int, seed: int) -> None:
    """Of the quick tier one corner and one schedule each, so that every kernel runs with and without flags."""
    for dtype, time in zip(HALVES, ("lengths+reset", ""), strict=True):
        case = Case(6, 19, 3, 72, time=time, reverse=build % 2 == 0)
        check("lstm", inputs_of(case, 4, dtype), SCHEDULES[build % 5], seed, regime="cluster", build=build)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", CORNERS + SMALL, ids=str)
def test_corners_of_the_cluster(case: Case, build: int, dtype: torch.dtype, schedule: int, seed: int) -> None:
    check("lstm", draws_for("lstm", case, dtype), schedule, seed, regime="cluster", build=build)


@pytest.mark.full
@pytest.mark.parametrize("H", [130, 384, 512, 640, 768])
def test_sizes_of_the_cluster(H: int, seed: int) -> None:
    """As many units as are served: weights beyond the registers lie in shared memory."""
    for dtype, time in ((torch.bfloat16, "reset"), (torch.float16, "")):
        check("lstm", inputs_of(Case(3, 8, 2, H, time=time), 4, dtype), 2, seed, regime="cluster")


def test_weights_in_shared_memory(seed: int) -> None:
    """Of eight blocks, more K tiles than the registers take: 6 of 8 in the forward, 4 of 8 in the backward."""
    check("lstm", inputs_of(Case(2, 3, 2, 256), 4, torch.bfloat16), 1, seed, regime="cluster", build=2)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("groups", [1, 2])
def test_the_grid(groups: int, seed: int) -> None:
    """Of the quick tier with and without flags, each dtype; chunks of the batch that are whole and that are not."""
    for dtype, time in zip(HALVES, ("lengths+reset", ""), strict=True):
        case = Case(4, 19, 3, 41, time=time, reverse=groups == 2)
        check("lstm", inputs_of(case, 4, dtype), 1 + groups, seed, regime="grid", build=groups)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", CORNERS + SMALL, ids=str)
def test_corners_of_the_grid(case: Case, groups: int, dtype: torch.dtype, schedule: int, seed: int) -> None:
    check("lstm", draws_for("lstm", case, dtype), schedule, seed, regime="grid", build=groups)


@pytest.mark.full
@pytest.mark.parametrize("H", [800, 1100])
def test_sizes_of_the_grid(H: int, seed: int) -> None:
    """Weights in registers alone, and some of them in shared memory."""
    check("lstm", inputs_of(Case(2, 3, 2, H, time="reset"), 4, torch.bfloat16), 4, seed, regime="grid")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_cells(op: str, dtype: torch.dtype, seed: int) -> None:
    """Rows that are 16 bytes apart and rows that are not."""
    for case, nonlinearity in zip((*CORNERS, SMALL[0]), ("tanh", "relu", "sigmoid", "tanh"), strict=True):
        check(op, draws_for(op, case, dtype, nonlinearity), 0, seed, regime="cell")


@pytest.mark.parametrize("regime", plan.REGIMES)
def test_large_inputs(regime: str, seed: int) -> None:
    """Sums of many thousands: tanh and the logistic function are exact there, and nothing is NaN."""
    made = draws_of(Case(2, 3, 4, 20), 4, torch.float16)
    for draw in made:
        enlarge(draw, 1e4)
    check("lstm", made, 0, seed, regime=regime)


@pytest.mark.parametrize("regime", ["cluster", "grid"])
def test_same_bits_in_every_schedule(regime: str, seed: int) -> None:
    """No sum hangs on who comes first."""
    inputs = inputs_of(Case(5, 11, 3, 40, time="reset"), 4, torch.bfloat16)

    def run(schedule: int) -> list[Tensor]:
        leaves = {
            n: v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in inputs.items()
        }
        with emulated(schedule), plan.override(regime=regime), use_implementation("cuda"):
            y = F.lstm(**leaves)[0]
            wanted = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
            return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    first = run(0)
    for schedule in SCHEDULES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, run(schedule), strict=True))


def test_the_plan_goes_by_shape() -> None:
    """A cluster in half types where it fits, cells for the rest, and what is forced and does not fit says why."""
    cpu = torch.device("cpu")
    with emulated():
        assert plan.choose(100, 16, 512, torch.bfloat16, cpu, False, False).regime == "cluster"
        assert plan.choose(100, 16, 768, torch.bfloat16, cpu, True, False).regime == "cluster"
        assert plan.choose(100, 16, 769, torch.bfloat16, cpu, False, False) == plan.Plan("grid", 1, 98)
        assert plan.choose(100, 16, 1536, torch.bfloat16, cpu, True, False) == plan.Plan("grid", 2, 96)
        assert plan.choose(100, 16, 4000, torch.bfloat16, cpu, False, False).regime == "cell"
        assert plan.choose(100, 2000, 1024, torch.bfloat16, cpu, False, False).regime == "cell"
        assert plan.choose(100, 16, 512, torch.float32, cpu, False, False).regime == "cell"
        assert plan.choose(1, 16, 512, torch.float16, cpu, False, False).regime == "cell"
        narrow = plan.choose(100, 16, 256, torch.float16, cpu, False, False)
        wide = plan.choose(100, 40, 256, torch.float16, cpu, False, False)
        assert (narrow.rows, narrow.clusters) == (8, 2)
        assert (wide.rows, wide.tiles, wide.clusters) == (16, 3, 2)
        with plan.override(regime="cluster"):
            with pytest.raises(RuntimeError, match="no build holds the recurrent weights of 1000 units"):
                plan.choose(100, 16, 1000, torch.float16, cpu, False, False)
            with pytest.raises(RuntimeError, match="float16 and bfloat16"):
                plan.choose(100, 16, 100, torch.float32, cpu, False, False)


def test_what_is_not_served_is_refused(seed: int) -> None:
    inputs = inputs_of(Case(2, 2, 3, 8), 4, torch.float32)
    with emulated(), use_implementation("cuda"):
        with pytest.raises(RuntimeError, match="do not serve h_mask"):
            F.lstm(**inputs, h_mask=torch.ones(2, 8))
        with pytest.raises(RuntimeError, match=r"proj_size"):
            F.lstm(**inputs_of(Case(2, 2, 3, 8, P=2), 4, torch.float32))
        with pytest.raises(RuntimeError, match="no CUDA kernels of nearest_center"):
            F.nearest_center(torch.ones(3, 2), torch.ones(2, 2))
        with pytest.raises(RuntimeError, match=r"not torch\.float64"):
            F.lstm(**inputs_of(Case(2, 2, 3, 8), 4, torch.float64))


def test_wrong_arguments_are_refused() -> None:
    """The extension checks what memory safety needs, since it can be called by itself."""
    module = emulator()
    with pytest.raises(ValueError, match="does not hold so many units"):
        module.resident_clusters(2, False, False, 0, 5000)
    with pytest.raises(ValueError, match="no such build"):
        module.resident_clusters(2, False, False, 17, 100)
    with pytest.raises(ValueError, match="bfloat16 and float16 only"):
        module.resident_clusters(0, False, False, 0, 100)
    with pytest.raises(ValueError, match="1 or 2 groups"):
        module.resident_blocks(2, False, False, 3, 16, 1000)
    with pytest.raises(ValueError, match="must not be null"):
        module.lstm_grid_forward(2, 1, (1, 1, 8), False, False, *([0] * 12), 0)
    with pytest.raises(ValueError, match="must not be null"):
        module.lstm_cluster_forward(2, 0, 1, (1, 1, 8), False, False, *([0] * 10), 0)


def test_without_the_extension_cuda_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.cuda import extension

    monkeypatch.setattr(extension, "_cuda", None)
    assert "fastseq._cuda was not built" in (dispatch.why_not("cuda", "cuda", "lstm") or "")
    with pytest.raises(RuntimeError, match=r"fastseq\._cuda was not built"), use_implementation("cuda"):
        pass


def test_the_emulator_serves_no_cuda_tensors() -> None:
    with emulated():
        assert dispatch.why_not("cuda", "cpu", "lstm") is None
        assert "not cuda" in (dispatch.why_not("cuda", "cuda", "lstm") or "")
