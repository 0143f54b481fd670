"""A run as rows of text: for the terminal, and for the README's table."""

from collections.abc import Iterator, Sequence

from fastseq.cli.bench.goals import Outcome
from fastseq.cli.bench.measure import Figures, Row
from fastseq.cli.timing import Quantiles

NOTHING = "–"
TITLES = {
    "torch": "torch ms",
    "compile": "compiled ms",
    "onnxruntime": "ORT ms",
    "openvino": "OpenVINO ms",
    "plain": "plain ms",
}
NOISY = 1.5  # p80 over p20
NUMBERS_FROM = 3  # the columns from here on hold numbers
GOALS_HEAD = ("goal", "figure", "measured", "must", "aim", "reached")

NOTES = (
    "Medians over interleaved rounds; vs torch is torch's time over fastseq's within a round, with its 20th and 80th "
    "percentiles: above 1, fastseq is faster. GF/s counts the matrix products of the steps that are no padding; % of "
    "peak is fastseq's share of this machine's multiply-adds in registers (half types: of float32's) or, marked r, "
    "with a batch of one, of its bandwidth for reading as many bytes as the recurrent weights have. MiB is how far "
    "memory grows during fastseq's calls, and during torch's after the stroke. The mode first is the first call of a "
    "new shape; plain is fastseq's layer without the option of the row."
)


def shown(rows: Sequence[Row]) -> list[str]:
    """The providers beside fastseq that have a column: torch, and those with figures."""
    return [name for name in TITLES if name == "torch" or any(name in row.figures for row in rows)]


def head(providers: Sequence[str]) -> tuple[str, ...]:
    """The titles of the columns."""
    milliseconds = (TITLES[name] for name in providers)
    figures = ("fastseq ms", "vs torch (p20–p80)", "GF/s", "% of peak", "MiB")
    return ("layer", "T, B, I, H, layers", "", *milliseconds, *figures)


def cells(row: Row, providers: Sequence[str]) -> tuple[str, ...]:
    """One row of the table."""
    ours, theirs = row.figures.get("fastseq"), row.figures.get("torch")

    def ms(name: str) -> str:
        return f"{row.figures[name].ms.median:.3g}" if name in row.figures else NOTHING

    kind = row.case.kind + (f", {row.forced_isa} forced" if row.forced_isa else "")
    memory = [NOTHING if one is None or one.memory_mib is None else f"{one.memory_mib:.0f}" for one in (ours, theirs)]
    return (
        kind,
        row.case.shape,
        row.case.mode,
        *(ms(name) for name in (*providers, "fastseq")),
        ratio(row.ratios.get("torch")),
        *speed(None if row.case.mode == "first" else ours),
        NOTHING if memory == [NOTHING, NOTHING] else " / ".join(memory),
    )


def speed(figures: Figures | None) -> tuple[str, str]:
    """GF/s and percent of the limit."""
    if figures is None or figures.gflops is None:
        return NOTHING, NOTHING
    mark = " r" if figures.limit == "read" else ""
    return f"{figures.gflops:.3g}", NOTHING if figures.percent is None else f"{figures.percent:.0f}{mark}"


def ratio(spread: Quantiles | None) -> str:
    """A ratio with its spread."""
    return NOTHING if spread is None else f"{spread.median:.2f} ({spread.p20:.2f}–{spread.p80:.2f})"


def goal_cells(outcome: Outcome) -> tuple[str, ...]:
    """One goal and what became of it."""
    goal = outcome.goal
    value = NOTHING if outcome.value is None else f"{outcome.value:.2f}×"
    note = "" if outcome.measured == outcome.cases else f" ({outcome.measured} of {outcome.cases} cases)"
    absent = [peer for peer in goal.peers if peer not in outcome.peers]
    if outcome.value is not None and absent:
        note += f" (without {', '.join(absent)})"
    aim, must = outcome.reaches(goal.aim), outcome.reaches(goal.must)
    reached = "not measured" if must is None else "aim" if aim else "must" if must else "no"
    bound = "at most " if goal.at_most else ""
    aimed = NOTHING if goal.aim is None else f"{goal.aim:g}×"
    return (goal.what, goal.unit.removesuffix(", at most"), value + note, f"{bound}{goal.must:g}×", aimed, reached)


def where(environment: dict[str, object]) -> str:
    """The machine and the versions in one sentence."""
    facts = {key: value for key, value in environment.items() if value is not None}
    names = {"torch": "torch", "onnxruntime": "onnxruntime", "openvino": "OpenVINO", "python": "Python"}
    versions = [f"{name} {facts[key]}" for key, name in names.items() if key in facts]
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instruction_set']}; "
        f"{', '.join(versions)}; {facts['date']}, commit `{str(facts.get('commit', '?'))[:12]}`"
    )


def peak_lines(environment: dict[str, object]) -> Iterator[str]:
    """The machine's measured limits."""
    found = environment.get("peaks")
    if not isinstance(found, dict):
        return
    for dtype, value in found["fma_gflops"].items():
        if value is not None:
            yield f"{value:.0f} GF/s {dtype}"
    for size, value in found["read_gbytes"].items():
        if value is not None:
            yield f"{value:.0f} GB/s reading {size}"


def disturbed(rows: Sequence[Row]) -> list[str]:
    """Keys of the cases in which torch's or fastseq's samples spread so far that the machine cannot have been quiet."""
    noisy = (row for row in rows if any(_spread(row.figures.get(name)) > NOISY for name in ("torch", "fastseq")))
    return [row.case.key + (f" ({row.forced_isa} forced)" if row.forced_isa else "") for row in noisy]


def _spread(figures: Figures | None) -> float:
    return 1.0 if figures is None else figures.ms.p80 / figures.ms.p20


def left_out(rows: Sequence[Row]) -> list[str]:
    """Why providers have no figures: each reason once, with the number of cases."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, reason in row.left_out.items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return [f"{name}: {reason} ({count} cases)" for (name, reason), count in counts.items()]
