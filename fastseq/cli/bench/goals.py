"""What the library wants to reach, and whether a run shows it: one table of goals over the measured rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastseq.cli.bench.cases import AUTOCAST_SHAPES, CASES, MEAN_LENGTH, OPTION_VARIANTS, SHAPES, Case, Shape
from fastseq.cli.bench.measure import Row

Select = Callable[[Case], bool]
STANDARD: Shape = (128, 32, 256, 256, 1)
RUNTIMES = ("torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Goal:
    """A figure over some cases: how much faster than the best of some peers, or how much dearer."""

    what: str
    select: Select
    must: float
    aim: float | None
    peers: tuple[str, ...] = ("torch",)
    worst: bool = False  # else the geometric mean
    first_over_warm: bool = False  # fastseq's own first call over a warm one: at most, not at least
    cost: bool = False  # fastseq's time over the peers': at most, not at least
    forced_isa: str | None = None

    @property
    def at_most(self) -> bool:
        """Whether the bounds are upper ones."""
        return self.first_over_warm or self.cost

    @property
    def unit(self) -> str:
        """How the figure is made."""
        return ("worst" if self.worst else "geometric mean") + (", at most" if self.at_most else "")

    def figure(self, row: Row) -> float | None:
        """What the goal is about in one row; None where fastseq or every peer was left out."""
        if self.first_over_warm:
            ours = row.figures.get("fastseq")
            return ours.first_over_warm.median if ours is not None and ours.first_over_warm is not None else None
        found = [row.ratios[peer].median for peer in self.peers if peer in row.ratios]
        slowest = min(found, default=None)
        return 1 / slowest if self.cost and slowest is not None else slowest


@dataclass(frozen=True)
class Outcome:
    """A goal as a run shows it."""

    goal: Goal
    value: float | None  # None where nothing was measured
    measured: int
    cases: int  # that the goal is about
    peers: tuple[str, ...]  # of the goal's, those that took part

    @property
    def complete(self) -> bool:
        """Whether every case of the goal was measured, against every peer."""
        return self.cases > 0 and self.measured == self.cases and self.peers == self.goal.peers

    def reaches(self, bound: float | None) -> bool | None:
        """Whether the value keeps a bound; None where either is missing."""
        if self.value is None or bound is None:
            return None
        return self.value <= bound if self.goal.at_most else self.value >= bound


def _of(mode: str, shapes: Sequence[Shape] = SHAPES, op: str = "lstm", **options: Any) -> Select:
    """Cases of a mode and of the shapes, that have the options and else are plain float32."""
    wanted = {Case(op, mode, *shape, **options) for shape in shapes}
    return wanted.__contains__


SEQUENCES = tuple(shape for shape in SHAPES if shape[0] > 1)
VALID = 1.3 * MEAN_LENGTH  # 1.3 times the share of the steps that are no padding
LONG: Shape = (4096, 16, 256, 256, 1)
SINGLE = tuple(shape for shape in SEQUENCES if shape[1] == 1)


def _cost_of(variant: str, shape: Shape = STANDARD) -> Select:
    return _of("training", [shape], variant=variant)


def _cheap(case: Case) -> bool:
    names = ("reset", *(name for name in OPTION_VARIANTS if name != "layer_norm"))
    return any(_cost_of(name)(case) for name in names)


GOALS = (
    Goal("training vs nn.LSTM", _of("training"), 1.75, 2.2),
    Goal("training vs nn.LSTM", _of("training"), 1.2, 1.4, worst=True),
    Goal("forward vs nn.LSTM, T > 1", _of("forward", SEQUENCES), 1.3, 1.5),
    Goal("forward vs nn.LSTM", _of("forward"), 0.97, 1.1, worst=True),
    Goal("forward, B = 1, T > 1, vs the best of all peers", _of("forward", SINGLE), 1.3, 1.8, RUNTIMES, worst=True),
    Goal("streaming step vs torch", _of("step", [(1, 1, 256, 256, 1)]), 8.0, 15.0),
    Goal("streaming step vs ORT", _of("step", [(1, 1, 256, 256, 1)]), 1.3, 2.5, ("onnxruntime",)),
    Goal("bfloat16 forward vs torch", _of("forward", dtype="bfloat16"), 1.2, 1.6),
    Goal("bfloat16 autocast training vs torch", _of("training", AUTOCAST_SHAPES, variant="autocast"), 1.2, 1.6),
    Goal("Elman RNN training vs nn.RNN", _of("training", [STANDARD], "rnn"), 2.0, 2.8),
    Goal("training of a packed batch vs torch", _of("training", [STANDARD], variant="packed"), 3.5, 6.0),
    Goal("training with uneven lengths vs torch's packing", _of("training", [STANDARD], variant="lengths"), 3.5, 6.0),
    Goal("float64 training vs torch", _of("training", [STANDARD], dtype="float64"), 2.0, 2.8),
    Goal("proj_size = H/2 training vs torch", _of("training", [STANDARD], proj_size=128), 2.0, 3.0),
    Goal("training with resets vs a loop over nn.LSTM", _of("training", [STANDARD], variant="reset"), 2.5, 3.5),
    Goal("AVX2 forced: training vs nn.LSTM", _of("training"), 1.4, 1.8, forced_isa="avx2"),
    Goal("first call of a new shape over a warm one", lambda case: case.mode == "first", 3.0, None, (), True, True),
    Goal("resets, noise, peepholes, clips over the plain layer", _cheap, 1.1, None, ("plain",), True, cost=True),
    Goal("layer normalisation over the plain layer", _cost_of("layer_norm"), 1.6, None, ("plain",), True, cost=True),
    Goal("uneven lengths over the plain layer", _cost_of("lengths"), VALID, None, ("plain",), True, cost=True),
    Goal("recomputing over keeping, T = 4096", _cost_of("recompute", LONG), 1.35, None, ("plain",), True, cost=True),
)  # fmt: skip


def outcomes(rows: Sequence[Row], cases: Sequence[Case] = CASES) -> list[Outcome]:
    """Every goal over the rows of a run."""
    found = []
    for goal in GOALS:
        mine = [row for row in rows if row.forced_isa == goal.forced_isa and goal.select(row.case)]
        figures = [figure for row in mine if (figure := goal.figure(row)) is not None]
        peers = tuple(peer for peer in goal.peers if any(peer in row.ratios for row in mine))
        total = sum(map(goal.select, cases))
        found.append(Outcome(goal, _reduced(goal, figures), len(figures), total, peers))
    return found


def _reduced(goal: Goal, figures: Sequence[float]) -> float | None:
    if not figures:
        return None
    if goal.worst:
        return max(figures) if goal.at_most else min(figures)
    return math.exp(sum(map(math.log, figures)) / len(figures))
