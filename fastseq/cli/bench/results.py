"""A run as a file: where it was measured, its rows, and what has changed since an older one."""

import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastseq.cli import console
from fastseq.cli.bench import peaks
from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.measure import Figures, Row
from fastseq.cli.timing import Quantiles

FORMAT = 2
# What must agree for rows of two runs to stand in one file.
IDENTITY = ("commit", "cpu", "cores", "threads", "fastseq", "torch", "python")


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of IDENTITY in which two environments differ."""
    return [name for name in IDENTITY if one.get(name) != other.get(name)]


@dataclass(frozen=True)
class Point:
    """One point of the scaling plot: one dimension, or the number of threads, varied."""

    axis: str  # "T", "B", "H" or "threads"
    value: int
    row: Row


@dataclass(frozen=True)
class Run:
    """What one or several calls of the command measured."""

    environment: dict[str, Any]
    rows: list[Row]
    scaling: list[Point]


def commit() -> str | None:
    """The commit of the checkout that fastseq runs from, ``+changes`` when files differ from it; None elsewhere."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # The results themselves do not count as a change.
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Where the figures come from: stored with them."""
    import fastseq

    facts = fastseq.info()
    threads = facts["cpu"]["threads"]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": facts["cpu"]["model"],
        "cores": facts["cpu"]["cores"],
        "threads": threads,
        "instruction_set": facts["cpu"]["isa"],
        "backends": {op: devices["cpu"]["backend"] for op, devices in facts["ops"].items()},
        "fastseq": facts["fastseq"],
        "torch": facts["torch"],
        "python": facts["python"],
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
        "peaks": peaks.measured(threads),
    }


def to_json(run: Run) -> dict[str, Any]:
    """The file's contents; a row's ``key`` is there for people and is not read back."""

    def row(one: Row) -> dict[str, Any]:
        return {"key": one.case.key, **asdict(one)}

    scaling = [{"axis": point.axis, "value": point.value, "row": row(point.row)} for point in run.scaling]
    return {
        "format": FORMAT,
        "environment": run.environment,
        "rows": [row(one) for one in run.rows],
        "scaling": scaling,
    }


def from_json(data: dict[str, Any]) -> Run:
    """A run as :func:`to_json` made it.

    Raises:
        ValueError: it has another format.
    """
    if data.get("format") != FORMAT:
        raise ValueError(f"expected a benchmark file of format {FORMAT}, got {data.get('format')!r}")
    points = [Point(each["axis"], each["value"], _row(each["row"])) for each in data["scaling"]]
    return Run(data["environment"], [_row(row) for row in data["rows"]], points)


def _row(data: dict[str, Any]) -> Row:
    def spread(values: dict[str, float]) -> Quantiles:
        return Quantiles(**values)

    def figures(values: dict[str, Any]) -> Figures:
        over_warm = values["first_over_warm"]
        changed = {"ms": spread(values["ms"]), "first_over_warm": None if over_warm is None else spread(over_warm)}
        return Figures(**(values | changed))

    return Row(
        case=Case(**data["case"]),
        isa=data["isa"],
        forced_isa=data["forced_isa"],
        threads=data["threads"],
        rounds=data["rounds"],
        figures={name: figures(values) for name, values in data["figures"].items()},
        ratios={name: spread(values) for name, values in data["ratios"].items()},
        left_out=data["left_out"],
        processes=data.get("processes", 1),
    )


def load(path: Path) -> Run:
    """The run in a file.

    Raises:
        CommandError: it cannot be read, or holds something else.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise console.CommandError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise console.CommandError(f"{path} holds no benchmark results: {error}") from None


def merged(old: Run, new: Run, order: Sequence[Case]) -> Run:
    """Both runs' rows, the newer where both have one, in the order of the cases.

    Raises:
        CommandError: they were measured in different places or with different versions.
    """
    if apart := differing(old.environment, new.environment):
        pairs = ", ".join(f"{key} {old.environment.get(key)!r} and {new.environment.get(key)!r}" for key in apart)
        raise console.CommandError(f"--update: the file's rows do not belong with these: {pairs}")
    rows = {(row.forced_isa, row.case): row for row in (*old.rows, *new.rows)}
    place = {case: index for index, case in enumerate(order)}
    ordered = sorted(rows.values(), key=lambda row: (row.forced_isa or "", place.get(row.case, len(place))))
    # A provider that was installed for either part is named.
    facts = old.environment | {key: value for key, value in new.environment.items() if value is not None}
    facts["peaks"] = _best_of(old.environment.get("peaks"), new.environment.get("peaks"))
    return Run(facts, ordered, new.scaling or old.scaling)


def _best_of(one: Any, other: Any) -> Any:
    """The larger of two limits, or of each of two sets of them: a limit is what the machine reached undisturbed."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _best_of(one.get(key), other.get(key)) for key in one | other}
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


@dataclass(frozen=True)
class Change:
    """A case whose ratio to a provider differs between two runs by more than the spread of either."""

    key: str
    peer: str
    before: Quantiles
    after: Quantiles

    @property
    def regressed(self) -> bool:
        """Whether fastseq has become slower beside the peer."""
        return self.after.median < self.before.median


def changes(old: Run, new: Run, peer: str = "torch") -> list[Change]:
    """Cases in both runs whose ratio to ``peer`` fell or rose, the intervals from p20 to p80 lying apart."""
    before = {(row.forced_isa, row.case): row for row in old.rows}
    found = []
    for row in new.rows:
        earlier = before.get((row.forced_isa, row.case))
        if earlier is None or peer not in row.ratios or peer not in earlier.ratios:
            continue
        was, now = earlier.ratios[peer], row.ratios[peer]
        if now.p80 < was.p20 or now.p20 > was.p80:
            name = row.case.key + (f" ({row.forced_isa} forced)" if row.forced_isa else "")
            found.append(Change(name, peer, was, now))
    return found
