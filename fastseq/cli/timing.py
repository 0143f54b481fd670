"""Timing that holds on a noisy machine: interleaved rounds, medians with their spread, ratios within a round."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

TARGET_SECONDS = 0.02  # how long one sample lasts at least, by repeating the call


@dataclass(frozen=True)
class Quantiles:
    """The median with the 20th and the 80th percentile, in the unit of the samples."""

    median: float
    p20: float
    p80: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    """The three figures of at least one sample."""
    median, p20, p80 = numpy.percentile(samples, [50, 20, 80]).tolist()
    return Quantiles(median, p20, p80)


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Times the calls in turn, ``rounds`` times, in an order that is reversed from one round to the next.

    Each sample repeats its call as often as makes it last ``TARGET_SECONDS``, after two calls that are not timed.

    Returns:
        Seconds per call of each sample, by name; the samples of one round are at the same place in every list.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(TARGET_SECONDS / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds):
        order = list(calls) if round_ % 2 == 0 else list(calls)[::-1]
        for name in order:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
        advance()
    return samples
