"""The LSTM layer against ``torch.nn.LSTM``: ``python -m pytest benchmarks/bench_lstm.py``."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import parametrize, run_case
from fastseq.cli.bench import Case, Pair


@parametrize("lstm")
def bench_lstm(benchmark: BenchmarkFixture, case: Case, mode: str) -> None:
    """One shape, forward or training."""
    run_case(benchmark, Pair(case), mode)
