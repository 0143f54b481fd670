"""Timing one case: every provider that serves it, checked, and then run in interleaved rounds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastseq.cli.bench import memory, peaks
from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.layers import Plain, reference_runner
from fastseq.cli.bench.problem import Problem, Runner, verify
from fastseq.cli.bench.providers import Provider
from fastseq.cli.timing import Quantiles, elapsed, interleaved, quantiles

WARM_CALLS = 5  # after the first call of a new shape


@dataclass(frozen=True)
class Figures:
    """One provider's figures in one case."""

    ms: Quantiles  # per call; of the first call in the mode "first"
    gflops: float | None  # 10^9 operations per second at the median; None in the mode "first", whose shapes differ
    percent: float | None  # of the machine's measured limit
    limit: str | None  # which one: "fma" or "read"
    memory_mib: float | None = None
    first_over_warm: Quantiles | None = None  # mode "first": the first call's time over a warm one's, shape by shape


@dataclass(frozen=True)
class Row:
    """One measured case."""

    case: Case
    isa: str
    forced_isa: str | None  # what FASTSEQ_CPU_ISA forced, with torch and oneDNN held to the same
    threads: int
    rounds: int
    figures: dict[str, Figures]
    ratios: dict[str, Quantiles]  # another provider's time over fastseq's, round by round: above 1, fastseq is faster
    left_out: dict[str, str] = field(default_factory=dict)  # why a provider has no figures
    processes: int = 1  # of so many this is the one in the middle


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 15  # at most
    seconds: float = 4.0  # for all rounds of a case: long ones get fewer rounds
    memory: bool = True
    forced_isa: str | None = None


def call_of(problem: Problem, runner: Runner) -> Callable[[], object]:
    """What is timed."""
    match problem.case.mode:
        case "training":
            return lambda: runner.training(problem.grad_output)
        case "step":
            return runner.step
        case _:
            return lambda: runner.forward(problem.input)


def measure(
    case: Case, providers: Sequence[Provider], settings: Settings, advance: Callable[[float], None] = lambda share: None
) -> Row:
    """Checks and times one case.

    Args:
        case: what to measure.
        providers: those to be timed if they serve the case.
        settings: how much.
        advance: called with the share of the case that has been done.

    Raises:
        fastseq.cli.bench.problem.Mismatch: results disagree.
    """
    from fastseq import cpu

    threads = torch.get_num_threads()
    reasons = {provider.name: provider.why_not(case) for provider in providers}
    serving = [provider for provider in providers if reasons[provider.name] is None]
    problem = Problem(case)
    runners = {provider.name: provider.runner(problem) for provider in serving}
    # The plain layer has results of its own, which its own case checks.
    verify(problem, {name: runner for name, runner in runners.items() if name != Plain.name}, reference_runner)
    warm: dict[str, list[float]] = {}
    if case.mode == "first":
        samples, warm = first_calls(problem, runners, settings.rounds, advance)
    else:
        calls = {name: call_of(problem, runner) for name, runner in runners.items()}
        pools = {provider.name: provider.pool for provider in serving}
        samples = interleaved(calls, settings.rounds, advance, seconds=settings.seconds, pools=pools)

    def figures(name: str) -> Figures:
        spread = quantiles([1e3 * value for value in samples[name]])
        seconds = spread.median / 1e3
        one_shape = case.mode != "first"
        reached = peaks.percent(case, problem.gflop, seconds, threads) if one_shape else None
        grown = None
        if settings.memory and case.mode in ("forward", "training") and name != Plain.name:
            grown = memory.peak_mib(case, name, threads)
        over_warm = [first / later for first, later in zip(samples[name], warm.get(name, ()), strict=False)]
        return Figures(
            ms=spread,
            gflops=problem.gflop / seconds if one_shape else None,
            percent=reached[0] if reached else None,
            limit=reached[1] if reached else None,
            memory_mib=grown,
            first_over_warm=quantiles(over_warm) if over_warm else None,
        )

    return Row(
        case=case,
        isa=cpu.isa(),
        forced_isa=settings.forced_isa,
        threads=threads,
        rounds=len(next(iter(samples.values()), ())),
        figures={name: figures(name) for name in runners},
        ratios=ratios(samples),
        left_out={name: reason for name, reason in reasons.items() if reason is not None},
    )


def ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, Quantiles]:
    """Each provider's time over fastseq's within each round."""
    ours = samples.get("fastseq", ())
    return {
        name: quantiles([other / own for other, own in zip(theirs, ours, strict=True)])
        for name, theirs in samples.items()
        if name != "fastseq" and ours
    }


def new_shapes(case: Case, count: int) -> list[tuple[int, int]]:
    """``count`` pairs (T, B) near the case's, no two with the same T, and none of them the case's own."""
    return [(case.T + 1 + k, case.B + k % 3) for k in range(count)]


def first_calls(
    problem: Problem, runners: Mapping[str, Runner], rounds: int, advance: Callable[[float], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the first call of each new shape, and of a warm call of that shape (the median of a few), by name.

    The layer itself has been called before, at the case's own shape.
    """
    generator = torch.Generator().manual_seed(1)
    first: dict[str, list[float]] = {name: [] for name in runners}
    warm: dict[str, list[float]] = {name: [] for name in runners}
    for round_, (T, B) in enumerate(new_shapes(problem.case, rounds)):
        input = torch.randn(T, B, problem.case.I, generator=generator).to(problem.dtype)
        for name in list(runners) if round_ % 2 == 0 else list(runners)[::-1]:
            forward = runners[name].forward
            first[name].append(elapsed(lambda: forward(input)))  # noqa: B023
            warm[name].append(quantiles([elapsed(lambda: forward(input)) for _ in range(WARM_CALLS)]).median)  # noqa: B023
        advance(1 / rounds)
    return first, warm
