"""How time grows with T, B, H and the number of threads, one of them varied at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.measure import Row, Settings, measure
from fastseq.cli.bench.providers import Provider
from fastseq.cli.bench.results import Point

BASE = Case("lstm", "training", 128, 32, 256, 256)
VALUES = {"T": (8, 32, 128, 256), "B": (1, 4, 16, 64), "H": (64, 128, 256, 512)}
SETTINGS = Settings(rounds=5, seconds=0.5, memory=False)


def cases(threads: int, base: Case = BASE) -> Iterator[tuple[str, int, Case]]:
    """Axis, value and case of every point; with H the input size grows too."""
    for value in VALUES["T"]:
        yield "T", value, replace(base, T=value)
    for value in VALUES["B"]:
        yield "B", value, replace(base, B=value)
    for value in VALUES["H"]:
        yield "H", value, replace(base, I=value, H=value)
    powers = [2**k for k in range(threads.bit_length()) if 2**k < threads]
    for value in (*powers, threads):
        yield "threads", value, base


def measure_points(providers: Sequence[Provider], advance: Callable[[float], None] = lambda share: None) -> list[Point]:
    """All points, on as many threads as torch has but where those are varied; fastseq and ``torch.nn``, checked first.

    Raises:
        fastseq.cli.bench.problem.Mismatch: results disagree.
    """
    own = [provider for provider in providers if provider.name in ("torch", "fastseq")]
    before = torch.get_num_threads()
    points = []
    done: dict[tuple[Case, int], Row] = {}  # the axes cross in one point
    try:
        for axis, value, case in cases(before):
            threads = value if axis == "threads" else before
            torch.set_num_threads(threads)
            if (case, threads) in done:
                advance(1.0)
            else:
                done[case, threads] = measure(case, own, SETTINGS, advance)
            points.append(Point(axis, value, done[case, threads]))
    finally:
        torch.set_num_threads(before)
    return points
