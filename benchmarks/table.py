"""``python -m benchmarks.table``: writes the README's tables of figures from ``benchmarks/results/cpu.json``."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastseq.cli.bench import report
from fastseq.cli.bench.goals import outcomes
from fastseq.cli.bench.results import Run, from_json

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
BEGIN = "<!-- figures: written by `python -m benchmarks.table` -->"
END = "<!-- end of figures -->"
MISSING = "No figures are committed yet: `make bench` measures them on your machine.\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> list[str]:
    """Lines of Markdown; the columns from ``numbers_from`` on are aligned to the right."""
    rule = ["---" if place < numbers_from else "---:" for place in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def render(run: Run | None) -> str:
    """Where it was measured, the goals, the figures; a sentence when there are no results."""
    if run is None:
        return MISSING
    providers = report.shown(run.rows)
    rounds = sorted(row.rounds for row in run.rows)
    lines = [
        f"{report.where(run.environment)}. {rounds[0]} to {rounds[-1]} rounds. {report.NOTES}",
        "",
        f"The machine's limits, measured: {', '.join(report.peak_lines(run.environment))}.",
        "",
        *table(
            report.GOALS_HEAD, [report.goal_cells(outcome) for outcome in outcomes(run.rows)], len(report.GOALS_HEAD)
        ),
        "",
        *table(report.head(providers), [report.cells(row, providers) for row in run.rows], report.NUMBERS_FROM),
    ]
    absent = report.left_out(run.rows)
    if absent:
        lines += ["", "Left out: " + "; ".join(absent) + "."]
    return "\n".join(lines) + "\n"


def updated(readme: str, run: Run | None) -> str:
    """The README with what lies between the markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected the markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{render(run)}{END}{after}"


def load() -> Run | None:
    """The committed results, or None."""
    return from_json(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else None


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8"), load()), encoding="utf-8")
