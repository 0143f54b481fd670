"""The GPU benchmark's figures as a Markdown table and two plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """All figures that there are so far."""
    where = results["environment"]
    lines = [
        "# The Triton kernels on a GPU",
        "",
        ", ".join(f"{name} {value}" for name, value in where.items()) + ".",
        f"{results['state']}.",
        "",
        "Medians of interleaved rounds, in ms; the ratio is torch's time over fastseq's, with its 20th and 80th",
        "percentiles: above 1, fastseq is faster. torch is cuDNN; with lengths it packs, with resets it loops.",
        "",
        "| layer | | dtype | torch | fastseq | ratio | µs a step | regime |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in results["rows"]:
        ratio = row["ratio"]
        lines.append(
            f"| {row['case']} | {row['mode']} | {row['kind']} | {row['torch_ms']['median']:.3g} "
            f"| {row['fastseq_ms']['median']:.3g} "
            f"| {ratio['median']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f}) | {row['microseconds_a_step']:.2f} "
            f"| {'; '.join(f'{name}: {plan}' for name, plan in row['plans'].items())} |"
        )
    lines += clustering(results["clustering"])
    sections = {"CUDA C++": "cuda", "Floors": "floors", "Variants": "variants", "Peers": "peers"}
    for title, rows in ((title, results[key]) for title, key in sections.items()):
        if rows:
            lines += ["", f"## {title}", "", "| | |", "|---|---:|"]
            lines += [f"| {row['name']} | {row['value']:.3g} {row['unit']} |" for row in rows]
    if results["sanitizer"]:
        lines += [
            "",
            "compute-sanitizer: " + ", ".join(f"{check} {how}" for check, how in results["sanitizer"].items()),
        ]
    if results["problems"]:
        lines += ["", "## Problems", "", *(f"- {problem}" for problem in results["problems"])]
    return "\n".join(lines) + "\n"


def clustering(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the clustering operations."""
    if not rows:
        return []
    lines = [
        "",
        "## Clustering, float32",
        "",
        "Medians in ms; the floors are those of the memory and of the arithmetic units by the GPU's clocks.",
        "",
        "| N, d, K | | fastseq | others | floors |",
        "|---|---|---:|---|---|",
    ]
    for row in rows:
        others = [f"{name} {ms['median']:.3g}" for name, ms in row["ms"].items() if name != "fastseq"]
        floors = [f"{kind} {row[f'{kind}_ms']:.3g}" for kind in ("copy", "arithmetic") if row[f"{kind}_ms"] is not None]
        ours = row["ms"]["fastseq"]["median"]
        lines.append(f"| {row['case']} | {row['op']} | {ours:.3g} | {', '.join(others)} | {', '.join(floors)} |")
    return lines


def plots(results: dict[str, Any], folder: Path) -> None:
    """``speed.png``, the ratios, and ``floors.png``, the time of a step beside the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["mode"] == "training"]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.25 * max(1, len(rows))))
    names = [f"{row['case']} {row['kind']}" for row in rows]
    axes.barh(names, [row["ratio"]["median"] for row in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("torch's time over fastseq's, training")
    axes.invert_yaxis()
    figure.savefig(folder / "speed.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)

    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.25 * max(1, len(results["rows"]))))
    rows = [row for row in results["rows"] if row["mode"] == "forward"]
    axes.barh([f"{row['case']} {row['kind']}" for row in rows], [row["microseconds_a_step"] for row in rows])
    for number, floor in enumerate(row for row in results["floors"] if row["unit"] == "µs"):
        style = ("-", "--", ":", "-.")[number % 4]
        axes.axvline(floor["value"], color="gray", linestyle=style, linewidth=1, label=floor["name"])
    axes.set_xlabel("µs a step, forward")
    axes.invert_yaxis()
    if results["floors"]:
        axes.legend(fontsize=6)
    figure.savefig(folder / "floors.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
