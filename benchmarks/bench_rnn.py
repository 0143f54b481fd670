"""The RNN layer against ``torch.nn.RNN``: ``python -m pytest benchmarks/bench_rnn.py``."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import parametrize, run_case
from fastseq.cli.bench import Case, Pair


@parametrize("rnn")
def bench_rnn(benchmark: BenchmarkFixture, case: Case, mode: str) -> None:
    """One shape, forward or training."""
    run_case(benchmark, Pair(case), mode)
