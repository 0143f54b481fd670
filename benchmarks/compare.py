"""What the ``bench_*.py`` files share: one verified case under pytest-benchmark, its peer timed between the rounds."""

import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastseq.cli.bench import CASES, MODES, Pair
from fastseq.cli.timing import quantiles

ROUNDS = 15


def parametrize(op: str) -> pytest.MarkDecorator:
    """All modes of all cases of an operation."""
    params = [
        pytest.param(case, mode, id=f"{case.kind}-{case.shape}-{mode}".replace(", ", "_").replace(" ", "_"))
        for case in CASES
        if case.op == op
        for mode in MODES
    ]
    return pytest.mark.parametrize(("case", "mode"), params)


def run_case(benchmark: BenchmarkFixture, pair: Pair, mode: str) -> None:
    """Verifies, then times fastseq; ``torch.nn`` runs once before each of its rounds, so that the two are interleaved,
    and its figures are stored beside fastseq's as ``extra_info``."""
    pair.verify()
    calls = pair.calls(mode)
    peer: list[float] = []

    def time_peer() -> None:
        start = time.perf_counter()
        calls["torch"]()
        peer.append(time.perf_counter() - start)

    benchmark.group = f"{pair.case.kind} {pair.case.shape} {mode}"
    benchmark.pedantic(calls["fastseq"], setup=time_peer, rounds=ROUNDS, warmup_rounds=2)
    spread = quantiles(peer[2:])
    benchmark.extra_info["torch_seconds"] = {"median": spread.median, "p20": spread.p20, "p80": spread.p80}
