"""``python -m benchmarks.table``: writes the README's table of figures from ``benchmarks/results/cpu.json``."""

import json
from pathlib import Path
from typing import Any

from fastseq.cli.bench import cells, row_from_json

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
BEGIN = "<!-- figures: written by `python -m benchmarks.table` -->"
END = "<!-- end of figures -->"
MISSING = "No figures are committed yet: `make bench` measures them on your machine.\n"


def render(results: dict[str, Any] | None) -> str:
    """The table as Markdown, with where it was measured; a sentence when there are no results."""
    if results is None:
        return MISSING
    facts = results["environment"]
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instruction_set']}; "
        f"torch {facts['torch']}, Python {facts['python']}; {facts['date']}, commit `{(facts['commit'] or '?')[:12]}`. "
        f"Medians of {results['rounds']} interleaved rounds; the ratio is torch's time over fastseq's, with its 20th "
        "and 80th percentiles: above 1, fastseq is faster.",
        "",
        "| layer | T, B, I, H, layers | | torch.nn, ms | fastseq, ms | ratio |",
        "|---|---|---|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(cells(row_from_json(row))) + " |" for row in results["rows"]]
    return "\n".join(lines) + "\n"


def updated(readme: str, results: dict[str, Any] | None) -> str:
    """The README with what lies between the markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected the markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{render(results)}{END}{after}"


def load() -> dict[str, Any] | None:
    """The committed results, or None."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8"), load()), encoding="utf-8")
