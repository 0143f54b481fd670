"""The README's table of clustering figures, from ``benchmarks/results/clustering.json``: part of `benchmarks.table`."""

import json
from pathlib import Path
from typing import Any

from benchmarks.bench_clustering_loss import CASES, GOALS
from benchmarks.markdown import table
from fastseq.cli.bench import report

RESULTS = Path(__file__).resolve().parent / "results" / "clustering.json"
BEGIN = "<!-- clustering figures: written by `python -m benchmarks.table` -->"
END = "<!-- end of clustering figures -->"
MISSING = "No figures are committed yet: `python -m benchmarks.bench_clustering_loss` measures them on your machine.\n"
HEAD = ("N, d, K", "", "ms (p20–p80)", "best of torch over it (p20–p80)", "must", "aim", "reached", "extra MiB")
NUMBERS_FROM = 2


def load() -> dict[str, Any] | None:
    """The committed results, or None."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per case and provider; the goals stand beside what they are set for."""
    goals = {str(case): GOALS[case] for case in CASES}
    lines: list[tuple[str, ...]] = []
    for each in results["cases"]:
        for name, figures in each["figures"].items():
            time, ratio, extra = figures["ms"], figures["ratio"], figures.get("extra_mib")
            judged = ("", "", "")
            if name == "fastseq":
                must, aim = goals[each["case"]]
                reached = "aim" if ratio["median"] >= aim else "must" if ratio["median"] >= must else "no"
                judged = (f"{must}×", f"{aim}×", reached)
            lines.append(
                (
                    each["case"].strip("()"),
                    f"{name} (best of torch)" if name == each["best"] else name,
                    f"{time['median']:.3g} ({time['p20']:.3g}–{time['p80']:.3g})",
                    f"{ratio['median']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})",
                    *judged,
                    "–" if extra is None else f"{extra:.1f}" if extra < 100 else f"{extra:.0f}",
                )
            )
    return lines


def render(results: dict[str, Any] | None) -> str:
    """Where it was measured and the figures; a sentence when there are no results."""
    if results is None:
        return MISSING
    counts = sorted({each["rounds"] for each in results["cases"]})
    rounds = " to ".join(str(count) for count in sorted({counts[0], counts[-1]}))
    lines = [
        f"{report.where(results['environment'])}. {rounds} interleaved rounds; ratios within a round. "
        "Extra: what memory grows by beside the gradients themselves.",
        "",
        *table(HEAD, rows(results), NUMBERS_FROM),
    ]
    return "\n".join(lines) + "\n"
