"""The LSTM layer against ``torch.nn.LSTM``: ``python -m pytest benchmarks/bench_lstm.py``."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import parametrize, run_case
from fastseq.cli.bench.cases import Case


@parametrize("lstm")
def bench_lstm(benchmark: BenchmarkFixture, case: Case) -> None:
    """One shape, dtype and mode."""
    run_case(benchmark, case)
