"""What the ``bench_*.py`` files share: one verified case under pytest-benchmark, its peers timed between the rounds."""

import itertools
import time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastseq.cli.bench.cases import CASES, Case
from fastseq.cli.bench.layers import reference_runner
from fastseq.cli.bench.measure import call_of, new_shapes
from fastseq.cli.bench.problem import Problem, Runner, verify
from fastseq.cli.bench.providers import PROVIDERS
from fastseq.cli.timing import quantiles

ROUNDS = 15
LONG_GFLOP, LONG_ROUNDS = 15.0, 5  # cases above so much arithmetic take fewer rounds


def parametrize(op: str) -> pytest.MarkDecorator:
    """All cases of an operation."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.key) for case in CASES if case.op == op])


def run_case(benchmark: BenchmarkFixture, case: Case) -> None:
    """Verifies, then times fastseq; the other libraries run once before each of its rounds, so that all are
    interleaved, and their figures are stored beside fastseq's as ``extra_info``."""
    providers = [provider for provider in PROVIDERS if provider.name != "compile" and provider.why_not(case) is None]
    if providers[-1].name != "fastseq":
        pytest.skip(str(PROVIDERS[-1].why_not(case)))
    problem = Problem(case)
    runners = {provider.name: provider.runner(problem) for provider in providers}
    verify(problem, runners, reference_runner)
    ours = runners.pop("fastseq")
    rounds = ROUNDS if case.gflop() < LONG_GFLOP else LONG_ROUNDS
    peers: dict[str, list[float]] = {name: [] for name in runners}
    shapes = itertools.cycle(new_shapes(case, rounds + 1))

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Times the peers, on the input that fastseq is given after them."""
        T, B = next(shapes) if case.mode == "first" else (case.T, case.B)
        input = torch.randn(T, B, case.I).to(problem.dtype) if case.mode == "first" else problem.input
        for name, runner in runners.items():
            call = _call(problem, runner, input)
            start = time.perf_counter()
            call()
            peers[name].append(time.perf_counter() - start)
        return (_call(problem, ours, input),), {}

    benchmark.group = case.key
    benchmark.pedantic(lambda call: call(), setup=setup, rounds=rounds, warmup_rounds=1)
    for name, samples in peers.items():
        spread = quantiles(samples[1:])
        figures = {"median": spread.median, "p20": spread.p20, "p80": spread.p80}
        benchmark.extra_info[f"{name}_seconds"] = figures


def _call(problem: Problem, runner: Runner, input: torch.Tensor) -> Any:
    return (lambda: runner.forward(input)) if problem.case.mode == "first" else call_of(problem, runner)
