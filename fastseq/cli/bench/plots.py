"""Two pictures of a run: bars of the ratios, and time against each dimension."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastseq.cli import console
from fastseq.cli.bench.measure import Row
from fastseq.cli.bench.report import where
from fastseq.cli.bench.results import Point, Run

COLOURS = {
    "torch": "tab:gray",
    "compile": "tab:purple",
    "onnxruntime": "tab:orange",
    "openvino": "tab:green",
    "plain": "tab:cyan",
    "fastseq": "tab:blue",
}


def scaling_path(path: Path) -> Path:
    """Where the scaling plot goes beside the bar chart."""
    return path.with_name(f"{path.stem}-scaling{path.suffix}")


def draw(run: Run, path: Path) -> list[Path]:
    """Writes the bar chart to ``path``, and the scaling plot beside it where the run has one.

    Raises:
        CommandError: matplotlib is missing, or a file cannot be written.
    """
    console.require("matplotlib", "--plot")
    from matplotlib.figure import Figure

    pictures: list[tuple[Path, Callable[[Any], None]]] = []
    if run.rows:
        pictures.append((path, lambda figure: bars(figure, run.rows)))
    if run.scaling:
        pictures.append((scaling_path(path), lambda figure: scaling(figure, run.scaling)))
    for target, make in pictures:
        figure: Any = Figure()
        make(figure)
        figure.text(0.01, 0.002, where(run.environment).replace("`", ""), fontsize=6, color="dimgray")
        try:
            figure.savefig(target, dpi=130)
        except (OSError, ValueError) as error:
            raise console.CommandError(f"cannot write {target}: {error}") from None
    return [target for target, _ in pictures]


def bars(figure: Any, rows: Sequence[Row]) -> None:
    """Time of each provider over fastseq's: one group of bars per case, on a logarithmic axis."""
    shown = [row for row in rows if row.ratios]
    figure.set_size_inches(10, 1.5 + 0.28 * max(1, len(shown)))
    axes = figure.subplots()
    labels = []
    for place, row in enumerate(shown):
        label = f"{row.case.kind}  {row.case.shape}  {row.case.mode}"
        labels.append(label + (f", {row.forced_isa} forced" if row.forced_isa else ""))
        width = 0.8 / len(row.ratios)
        for index, (name, spread) in enumerate(row.ratios.items()):
            error = [[spread.median - spread.p20], [spread.p80 - spread.median]]
            at = place - 0.4 + (index + 0.5) * width
            axes.barh(at, spread.median - 1, width, left=1, color=COLOURS[name], xerr=error, ecolor="black")
    for name in dict.fromkeys(name for row in shown for name in row.ratios):
        axes.barh(0, 0, left=1, color=COLOURS[name], label=f"{name} / fastseq")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], minor=False)
    axes.set_xlabel("time of the other library over fastseq's (right of 1: fastseq is faster)")
    if shown:
        axes.legend(fontsize=7)
    figure.tight_layout(rect=(0, 0.01, 1, 1))


def scaling(figure: Any, points: Sequence[Point]) -> None:
    """Milliseconds against T, B, H and threads, both axes logarithmic, with the spread as a band."""
    axes_names = list(dict.fromkeys(point.axis for point in points))
    figure.set_size_inches(11, 3.4)
    base = next(point.row.case for point in points if point.axis == axes_names[-1])
    for panel, axis in zip(figure.subplots(1, len(axes_names), squeeze=False)[0], axes_names, strict=True):
        mine = sorted((point for point in points if point.axis == axis), key=lambda point: point.value)
        for name in dict.fromkeys(name for point in mine for name in point.row.figures):
            known = [(point.value, point.row.figures[name].ms) for point in mine if name in point.row.figures]
            values = [value for value, _ in known]
            panel.plot(values, [ms.median for _, ms in known], "o-", color=COLOURS[name], label=name, markersize=4)
            panel.fill_between(
                values, [ms.p20 for _, ms in known], [ms.p80 for _, ms in known], color=COLOURS[name], alpha=0.25
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks([point.value for point in mine], [str(point.value) for point in mine])
        panel.set_xlabel("H = I" if axis == "H" else axis)
    first = figure.axes[0]
    first.set_ylabel(f"{base.kind} {base.mode}, ms")
    first.legend(fontsize=8)
    figure.suptitle(f"around T, B, I, H, layers = {base.shape}", fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
