"""Small benchmark cases and made-up runs, for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Iterable

from fastseq.cli.bench.cases import OPTION_VARIANTS, Case
from fastseq.cli.bench.measure import Figures, Row
from fastseq.cli.bench.results import Run
from fastseq.cli.timing import Quantiles

SMALL = (
    Case("lstm", "forward", 5, 3, 4, 6, layers=2),
    Case("lstm", "training", 5, 3, 4, 6, layers=2),
    Case("lstm", "training", 5, 3, 4, 6, variant="autocast"),
    Case("lstm", "training", 5, 3, 4, 6, proj_size=2, variant="lengths"),
    Case("lstm", "training", 5, 3, 4, 6, variant="packed"),
    Case("lstm", "training", 9, 7, 4, 6, variant="reset"),
    Case("lstm", "forward", 5, 7, 4, 6, dtype="bfloat16"),
    Case("lstm", "training", 5, 1, 4, 6, dtype="float64"),
    Case("lstm", "first", 5, 3, 4, 6),
    Case("lstm", "step", 1, 2, 4, 6),
    Case("lstm", "training", 9, 7, 4, 6, variant="recompute"),
    *(Case("lstm", "training", 9, 7, 4, 6, variant=variant) for variant in OPTION_VARIANTS),
    Case("rnn", "training", 5, 3, 4, 6, nonlinearity="relu"),
)

ENVIRONMENT = {
    "date": "2001-02-03",
    "commit": "c" * 40,
    "cpu": "a processor",
    "cores": 4,
    "threads": 2,
    "instruction_set": "avx2",
    "backends": {"lstm": "cpp"},
    "fastseq": "0",
    "torch": "0",
    "python": "3",
    "onnxruntime": None,
    "openvino": None,
    "peaks": {"fma_gflops": {"float32": 100.0, "float64": None}, "read_gbytes": {"16 KiB per thread": 50.0}},
}


def spread(median: float, width: float = 0.1) -> Quantiles:
    """A median with percentiles as far from it as ``width`` times it."""
    return Quantiles(median, median * (1 - width), median * (1 + width))


def row(case: Case, ratio: float | None, *, forced_isa: str | None = None, first: float | None = None) -> Row:
    """A measured case: fastseq at 2 ms, and torch so that the ratio is as given; without one fastseq was left out."""
    figures = {"torch": Figures(spread(2 * (ratio or 1)), 10.0, 20.0, "fma", 3.0)}
    if ratio is not None:
        over_warm = None if first is None else spread(first)
        figures["fastseq"] = Figures(spread(2.0), 10.0, 25.0, "read" if case.B == 1 else "fma", 1.0, over_warm)
    ratios = {} if ratio is None else {"torch": spread(ratio)}
    left_out = {} if ratio is not None else {"fastseq": "not there"}
    return Row(case, "avx2", forced_isa, 2, 9, figures, ratios, left_out)


def run_of(rows: Iterable[Row], **facts: object) -> Run:
    """A run of these rows."""
    return Run(ENVIRONMENT | facts, list(rows), [])
