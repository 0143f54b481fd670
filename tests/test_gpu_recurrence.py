"""The Triton kernels on a GPU: every tensor by the one tolerance rule, repeatability, streams, and that nothing hangs.

``make gpu`` runs these on a machine that has one; elsewhere they are deselected.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from gpu_support import assert_comes_back, assert_same_bits_on_a_second_stream, on_gpu, y_and_gradients
from recurrence_cases import Case, draws_of, inputs_of
from torch import Tensor

from fastseq import functional as F
from fastseq.kernels import plan
from fastseq.testing import assert_matches_reference, use_implementation

pytestmark = pytest.mark.gpu
OPS = {"lstm": 4, "rnn": 1}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REGIMES: list[dict[str, Any]] = [
    {"regime": "resident"},
    {"regime": "persistent", "BB": 16, "BH": 16},
    {"regime": "persistent", "BB": 16, "BH": 16, "sync": "flags"},
    {"regime": "persistent", "BB": 32, "BH": 8, "held": 0},
    {"regime": "persistent", "BB": 16, "BH": 8, "KC": 16, "held": 1},
    {"regime": "persistent", "BB": 16, "BH": 16, "KC": 16, "held": 99, "registers": 1},
    {"regime": "step"},
]
# A child that runs long sequences by many waiting programs; killed, and the run given up, if it does not come back.
HANG_SECONDS = 90
HANGS = """
import torch
from fastseq import functional as F
from fastseq.kernels import plan
from fastseq.testing import use_implementation
for sync in plan.SYNCS:
    with plan.override(regime="persistent", sync=sync), use_implementation("triton"):
        for T, B, H in ((3000, 16, 768), (500, 70, 512), (1000, 4, 1024)):
            make = lambda *shape: (torch.rand(shape, device="cuda") / 8).half().requires_grad_()
            args = make(T, B, 32), make(B, H), make(B, H), make(4 * H, 32), make(4 * H, H)
            y = F.lstm(*args)[0]
            torch.autograd.grad(y.sum(), args)
torch.cuda.synchronize()
"""


def draws(op: str, case: Case, dtype: torch.dtype, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [on_gpu(draw) for draw in draws_of(case, OPS[op], dtype, options)]


def test_nothing_hangs() -> None:
    """First, since a hang would take everything after it along."""
    assert_comes_back(HANGS, HANG_SECONDS)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", REGIMES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_outputs_and_gradients(regime: dict[str, Any], op: str, dtype: torch.dtype, seed: int) -> None:
    for case in (Case(9, 35, 5, 40, time="lengths+reset"), Case(12, 33, 7, 63, reverse=True)):
        with plan.override(**regime):
            assert_matches_reference(op, draws(op, case, dtype), implementation="triton", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", plan.REGIMES)
def test_masks_zoneout_and_peepholes(regime: str, op: str, dtype: torch.dtype, seed: int) -> None:
    fields = {"regime": regime} | ({"BB": 16, "BH": 16} if regime == "persistent" else {})
    case = Case(9, 35, 5, 41, time="lengths+reset", reverse=regime == "persistent")
    for zoneout in ("zoneout", "zoneout by rate") if op == "lstm" else ("",):
        options = ("h_mask", "peephole", zoneout) if op == "lstm" else ("h_mask",)
        with plan.override(**fields):
            assert_matches_reference(op, draws(op, case, dtype, options), implementation="triton", seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("H", [256, 331, 650, 768])
def test_many_programs(H: int, op: str, dtype: torch.dtype, seed: int) -> None:
    """Sizes whose groups have dozens of programs, by the plan that they take."""
    case = Case(60, 20, 16, H, time="reset" if H == 650 else "")
    assert_matches_reference(op, draws(op, case, dtype), implementation="triton", seed=seed)


def test_two_hundred_random_shapes(seed: int) -> None:
    """Few layers, since each width is compiled anew, and many lengths, batches and options of time."""
    draw = random.Random(seed)
    layers = [
        (op, H, dtype, reverse)
        for op, H, dtype, reverse in (
            ("lstm", 17, torch.float32, False),
            ("lstm", 100, torch.float16, True),
            ("lstm", 130, torch.bfloat16, False),
            ("lstm", 300, torch.float16, False),
            ("rnn", 65, torch.float16, True),
            ("rnn", 300, torch.bfloat16, False),
        )
    ]
    for _ in range(200):
        op, H, dtype, reverse = draw.choice(layers)
        time = draw.choice(["", "lengths+reset"])
        case = Case(draw.randint(2, 24), draw.randint(1, 90), draw.randint(1, 40), H, reverse=reverse, time=time)
        try:
            assert_matches_reference(op, draws(op, case, dtype), implementation="triton", seed=seed)
        except AssertionError as error:
            raise AssertionError(f"{case} {dtype}: {error}") from None


def gradients_of(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    return y_and_gradients(op, inputs, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_every_run(op: str, dtype: torch.dtype, seed: int) -> None:
    for case in (Case(300, 48, 32, 512), Case(50, 40, 32, 64)):
        inputs = on_gpu(inputs_of(dataclasses.replace(case), OPS[op], dtype))
        first = gradients_of(op, inputs)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients_of(op, inputs), strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_second_stream(op: str, seed: int) -> None:
    inputs = on_gpu(inputs_of(Case(200, 16, 32, 256), OPS[op], torch.float16))
    assert_same_bits_on_a_second_stream(lambda: gradients_of(op, inputs), times=3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("op", OPS)
def test_another_device(op: str, seed: int) -> None:
    """Tensors of a device that is not the current one."""
    inputs = on_gpu(inputs_of(Case(50, 16, 32, 256), OPS[op], torch.float16))
    there = {name: value.to("cuda:1") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = gradients_of(op, there)
    assert torch.cuda.current_device() == 0
    for a, b in zip(gradients_of(op, inputs), found, strict=True):
        assert b.device == torch.device("cuda:1")
        assert torch.equal(a, b.to(a.device))


@pytest.mark.parametrize("regime", ["resident", "persistent", "step"])
def test_a_callers_graph(regime: str, seed: int) -> None:
    """Captured once, replayed with other numbers in the same memory."""
    inputs = on_gpu(inputs_of(Case(20, 16, 32, 64), 4, torch.float16))
    with plan.override(regime=regime), use_implementation("triton"), torch.no_grad():
        F.lstm(**inputs)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = F.lstm(**inputs)[0]
        inputs["x"].uniform_(-1, 1)
        graph.replay()
        assert torch.equal(y, F.lstm(**inputs)[0])
