"""What each option costs over the plain layer: ``python -m benchmarks.option_costs`` measures, and `table` shows it.

Both layers run in the same rounds, on the standard shape of the benchmark; so does the loop that people write without
the option. The figures go to ``benchmarks/results/options.json``, and from there into the README.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import table
from fastseq.cli.bench import report
from fastseq.cli.bench.cases import CASES
from fastseq.cli.bench.goals import GOALS, Goal
from fastseq.cli.bench.measure import Row
from fastseq.cli.bench.results import Run, from_json
from fastseq.cli.main import main as fastseq

RESULTS = Path(__file__).resolve().parent / "results" / "options.json"
BEGIN = "<!-- option costs: written by `python -m benchmarks.table` -->"
END = "<!-- end of option costs -->"
MISSING = "No figures are committed yet: `python -m benchmarks.option_costs` measures them on your machine.\n"
HEAD = ("layer", "T, B, I, H, layers", "plain ms", "ms", "cost (p20–p80)", "at most", "reached", "torch ms", "gain")
NUMBERS_FROM = 2
COSTS = tuple(goal for goal in GOALS if goal.cost)
MEASURED = tuple(case for case in CASES if any(goal.select(case) for goal in COSTS))


def load() -> Run | None:
    """The committed results, or None."""
    return from_json(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else None


def cells(row: Row, goal: Goal) -> tuple[str, ...]:
    """One option."""
    ours, plain, torchs = row.figures["fastseq"], row.figures["plain"], row.figures["torch"]
    over, gain = row.ratios["plain"], row.ratios["torch"]  # the others' time over fastseq's
    cost = 1 / over.median
    return (
        row.case.kind,
        row.case.shape,
        f"{plain.ms.median:.3g}",
        f"{ours.ms.median:.3g}",
        f"{cost:.2f} ({1 / over.p80:.2f}–{1 / over.p20:.2f})",
        f"{goal.must:.3g}×",
        "yes" if cost <= goal.must else "no",
        f"{torchs.ms.median:.3g}",
        f"{gain.median:.2f}×",
    )


def render(run: Run | None) -> str:
    """Where it was measured and a row per option; a sentence when there are no results."""
    if run is None:
        return MISSING
    rows = [(row, goal) for row in run.rows for goal in COSTS if goal.select(row.case)]
    lines = [
        f"{report.where(run.environment)}. {min(row.rounds for row, _ in rows)} or more interleaved rounds; cost is "
        "fastseq's time with the option over its time without, gain the time of what people write with `torch.nn` over "
        "it, both within a round.",
        "",
        *table(HEAD, [cells(row, goal) for row, goal in rows], NUMBERS_FROM),
    ]
    several = [row for row, _ in rows if row.processes > 1]
    if several:
        named = ", ".join(f"{row.case.kind} at {row.case.shape} of {row.processes}" for row in several)
        lines += ["", f"Measured in several processes, of which this is the one in the middle: {named}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] = ()) -> int:
    """Measures; further arguments are those of ``python -m fastseq bench``."""
    cases = [f"--case={case.key}" for case in MEASURED]
    return fastseq(["bench", *cases, "--json", str(RESULTS), *arguments])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
