"""The RNN layer against ``torch.nn.RNN``: ``python -m pytest benchmarks/bench_rnn.py``."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import parametrize, run_case
from fastseq.cli.bench.cases import Case


@parametrize("rnn")
def bench_rnn(benchmark: BenchmarkFixture, case: Case) -> None:
    """One shape, dtype and mode."""
    run_case(benchmark, case)
