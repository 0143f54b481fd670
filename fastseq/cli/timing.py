"""Timing that holds on a noisy machine: interleaved rounds, medians with their spread, ratios within a round."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

TARGET_SECONDS = 0.02  # how long one sample lasts at least, by repeating the call
# How long calls of another thread pool than the last run untimed: onnxruntime's threads spin for 30 ms after a call.
SETTLE_SECONDS = 0.12
LEAST_ROUNDS = 5


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


def elapsed(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call of ``repeats`` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def settle(call: Callable[[], object]) -> None:
    """Calls, once at least, for ``SETTLE_SECONDS``."""
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < SETTLE_SECONDS:
        call()


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    advance: Callable[[float], None] = lambda share: None,
    *,
    seconds: float = math.inf,
    pools: Mapping[str, str] | None = None,
) -> dict[str, list[float]]:
    """Times the calls in turn, ``rounds`` times, in an order that is reversed from one round to the next.

    Each sample repeats its call as often as makes it last ``TARGET_SECONDS``. Where the thread pool changes, calls that
    are not timed go before it for ``SETTLE_SECONDS``: the threads of the last pool spin on at first, and two pools on
    the same cores slow each other down. A pause would do for that, but then the cores are idle, and threads that wake
    together may share a core, or a virtual machine's two cores a real one, for more than 60 ms.

    Args:
        calls: what to time, by name; each has been called before.
        rounds: samples of each, at most.
        advance: called after each round with the share of all rounds that it was.
        seconds: how long all rounds should last; fewer rounds are run where they would take longer, but at least
            ``LEAST_ROUNDS`` (or ``rounds``, if that is fewer).
        pools: the thread pool behind each name (default: one for all).

    Returns:
        Seconds per call of each sample, by name; the samples of one round are at the same place in every list.
    """
    pools = pools or {}
    repeats: dict[str, int] = {}
    expected = 0.0
    for name, call in calls.items():
        once = elapsed(call)
        if once < TARGET_SECONDS:
            once = elapsed(call)
        repeats[name] = max(1, round(TARGET_SECONDS / once))
        expected += once * repeats[name]
    if expected * rounds > seconds:
        rounds = min(rounds, max(LEAST_ROUNDS, int(seconds / expected)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    pool: str | None = None
    for round_ in range(rounds):
        order = list(calls) if round_ % 2 == 0 else list(calls)[::-1]
        for name in order:
            if pools.get(name) != pool:
                pool = pools.get(name)
                settle(calls[name])
            samples[name].append(elapsed(calls[name], repeats[name]))
        advance(1 / rounds)
    return samples
