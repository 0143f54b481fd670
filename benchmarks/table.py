"""``python -m benchmarks.table``: writes the README's tables of figures from ``benchmarks/results/*.json``."""

import json
from pathlib import Path
from typing import Any

from benchmarks import clustering_table, option_costs
from benchmarks.markdown import replaced, table
from fastseq.cli.bench import report
from fastseq.cli.bench.goals import outcomes
from fastseq.cli.bench.results import Run, from_json

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
BEGIN = "<!-- figures: written by `python -m benchmarks.table` -->"
END = "<!-- end of figures -->"
MISSING = "No figures are committed yet: `make bench` measures them on your machine.\n"


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


def updated(readme: str, run: Run | None, clustering: dict[str, Any] | None, options: Run | None) -> str:
    """The README with what lies between the markers replaced."""
    readme = replaced(readme, BEGIN, END, render(run))
    readme = replaced(readme, option_costs.BEGIN, option_costs.END, option_costs.render(options))
    return replaced(readme, clustering_table.BEGIN, clustering_table.END, clustering_table.render(clustering))


def load() -> Run | None:
    """The committed results, or None."""
    return from_json(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else None


if __name__ == "__main__":
    stored = load(), clustering_table.load(), option_costs.load()
    README.write_text(updated(README.read_text(encoding="utf-8"), *stored), encoding="utf-8")
