"""The CUDA C++ kernels on a GPU, by the one tolerance rule. ``make gpu`` runs these where there is one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gpu_support import assert_comes_back, assert_same_bits_on_a_second_stream, on_gpu, y_and_gradients
from recurrence_cases import Case, draws_of, inputs_of

from fastseq import cuda
from fastseq.cuda import extension, plan
from fastseq.testing import assert_matches_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.why_unavailable("cuda") is not None, reason=str(cuda.why_unavailable("cuda"))),
]
HALVES = [torch.float16, torch.bfloat16]
BUILDS = range(6)
HANG_SECONDS = 60
HANGS = """
import torch
from fastseq import functional as F
from fastseq.cuda import plan
from fastseq.testing import use_implementation
with use_implementation("cuda"):
    for T, B, H in ((3000, 16, 512), (500, 200, 256), (1000, 16, 768), (1000, 32, 1024)):
        make = lambda *shape: (torch.rand(shape, device="cuda") / 8).half().requires_grad_()
        args = make(T, B, 32), make(B, H), make(B, H), make(4 * H, 32), make(4 * H, H)
        y = F.lstm(*args)[0]
        torch.autograd.grad(y.sum(), args)
torch.cuda.synchronize()
"""


def has_clusters() -> bool:
    return bool(extension.extension().device_facts(torch.cuda.current_device())[0] >= 9)


def draws(op: str, case: Case, dtype: torch.dtype) -> list[dict[str, Any]]:
    return [on_gpu(draw) for draw in draws_of(case, 4 if op == "lstm" else 1, dtype)]


def test_nothing_hangs() -> None:
    """First, since a hang would take everything after it along."""
    assert_comes_back(HANGS, HANG_SECONDS)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("build", BUILDS)
def test_every_build_of_the_cluster(build: int, dtype: torch.dtype, seed: int) -> None:
    if not has_clusters():
        pytest.skip("this GPU has no thread-block clusters")
    for case in (Case(9, 35, 5, 40, time="lengths+reset"), Case(12, 33, 7, 63, reverse=True), Case(20, 200, 3, 96)):
        with plan.override(regime="cluster", build=build):
            assert_matches_reference("lstm", draws("lstm", case, dtype), implementation="cuda", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_grid(groups: int, dtype: torch.dtype, seed: int) -> None:
    for case in (Case(9, 35, 5, 40, time="lengths+reset"), Case(12, 33, 7, 63, reverse=True), Case(20, 70, 3, 300)):
        with plan.override(regime="grid", build=groups):
            assert_matches_reference("lstm", draws("lstm", case, dtype), implementation="cuda", seed=seed)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("H", [256, 512, 640, 650, 768, 1024, 1500])
def test_sizes(H: int, dtype: torch.dtype, seed: int) -> None:
    case = Case(60, 20, 16, H, time="reset" if H == 650 else "")
    assert_matches_reference("lstm", draws("lstm", case, dtype), implementation="cuda", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_cells(op: str, dtype: torch.dtype, seed: int) -> None:
    for case in (Case(9, 35, 5, 40, time="lengths+reset"), Case(12, 33, 7, 63, reverse=True), Case(1, 1, 1, 1)):
        with plan.override(regime="cell"):
            assert_matches_reference(op, draws(op, case, dtype), implementation="cuda", seed=seed)


def test_random_shapes(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        time = draw.choice(["", "lengths+reset"])
        H = draw.choice([draw.randint(1, 140), draw.randint(141, 768)])
        case = Case(
            draw.randint(1, 24), draw.randint(1, 90), draw.randint(1, 40), H, reverse=draw.random() < 0.5, time=time
        )
        dtype = draw.choice(HALVES)
        try:
            assert_matches_reference("lstm", draws("lstm", case, dtype), implementation="cuda", seed=seed)
        except AssertionError as error:
            raise AssertionError(f"{case} {dtype}: {error}") from None


def test_same_bits_on_every_run_and_on_a_second_stream(seed: int) -> None:
    inputs = on_gpu(inputs_of(Case(300, 48, 32, 512), 4, torch.float16))
    assert_same_bits_on_a_second_stream(lambda: y_and_gradients("lstm", inputs, "cuda"), times=4)


def test_an_error_names_its_call() -> None:
    with pytest.raises(RuntimeError, match="cudaDeviceGetAttribute: cudaErrorInvalidDevice"):
        extension.extension().device_facts(1000)
