"""The command line of the benchmark."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastseq.cli import console
from fastseq.cli.bench import cases, forced, plots, processes, report, results, scaling
from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.goals import outcomes
from fastseq.cli.bench.measure import Row, Settings, measure
from fastseq.cli.bench.problem import Mismatch
from fastseq.cli.bench.providers import PROVIDERS, Provider
from fastseq.cli.bench.results import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

WIDTH = 180  # of the table in a pipe or a file: room for the columns of every library
QUICK = Settings(rounds=5, seconds=1.0, memory=False)

DESCRIPTION = """Times the layers of torch.nn, onnxruntime, OpenVINO (where installed) and fastseq side by side: in one
process, in interleaved rounds, after checking that results and gradients agree with the float64 reference. Prints
the figures, the machine's measured limits, and which goals the run reaches."""

EPILOG = """Exit status: 0; 1 when results disagree, or --compare finds a regression; 2 when the command could not run.
examples: bench --quick | bench --mode training --case 128x32 | bench --json new.json --compare old.json |
bench --results benchmarks/results/cpu.json --plot speed.png"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "bench", help="time the layers against torch.nn and other libraries", description=DESCRIPTION, epilog=EPILOG
    )
    which = parser.add_argument_group("what is measured")
    which.add_argument("--op", choices=("lstm", "rnn"), action="append", help="only this operation (may be repeated)")
    which.add_argument("--mode", choices=cases.MODES, action="append", help="only this mode (may be repeated)")
    which.add_argument(
        "--case",
        action="append",
        metavar="TEXT",
        help="only cases whose key contains TEXT, or matches it as a pattern such as 'lstm-*-bfloat16-*' (may be "
        "repeated; --list shows the keys)",
    )
    which.add_argument("--list", action="store_true", help="print the keys of the selected cases and measure nothing")
    which.add_argument(
        "--quick",
        action="store_true",
        help=f"at most {QUICK.rounds} rounds, no memory figures, and no case above {cases.QUICK_GFLOP:g} GFLOP a call",
    )
    which.add_argument(
        "--rounds",
        type=console.positive_int,
        default=Settings.rounds,
        help="samples of each library, at most (%(default)s): a long case gets fewer, so as to take about "
        f"{Settings.seconds:g} s, but at least 5",
    )
    which.add_argument(
        "--processes",
        type=console.positive_int,
        default=1,
        metavar="N",
        help="measure each case in N processes and keep the one whose ratio is in the middle: the pages that a process "
        "gets may favour either side in all of its rounds",
    )
    which.add_argument("--threads", type=console.positive_int, help="torch.set_num_threads (default: as torch has it)")
    which.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile of the reference beside the others, where its loop is short enough to be compiled; takes "
        "minutes and a C++ compiler",
    )
    which.add_argument(
        "--avx2",
        action="store_true",
        help="then the LSTM's float32 training among the selected cases again, in a process in which fastseq, torch "
        "and oneDNN are held to AVX2",
    )
    which.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, help="peak memory of each, in processes of their own"
    )
    which.add_argument(
        "--scaling", action="store_true", help="also time against T, B, H and threads, for the plot (--plot implies it)"
    )
    which.add_argument(
        "--results", type=Path, metavar="FILE", help="measure nothing: show, plot or compare a stored run"
    )
    what = parser.add_argument_group("what is made of it")
    console.add_json_argument(what)
    what.add_argument(
        "--update",
        action="store_true",
        help="keep the rows that FILE of --json already has of the same machine and commit",
    )
    what.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the ratios as bars, and the scaling as FILE-scaling.png"
    )
    what.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="name the cases whose ratio to torch fell by more than the spread since that run: exit status 1 if any",
    )
    parser.add_argument("--rows-only", action="store_true", help=argparse.SUPPRESS)  # for processes.run
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures or loads a run, shows it, and judges it."""
    selected = cases.select(cases.CASES, ops=args.op, modes=args.mode, patterns=args.case, quick=args.quick)
    if args.list:
        print("\n".join(case.key for case in selected))
        return 0
    console.require("rich", "bench")
    if args.plot is not None:
        console.require("matplotlib", "--plot")
        for path in (args.plot, plots.scaling_path(args.plot)):
            console.check_writable(path)
    old = None if args.compare is None else results.load(args.compare)
    if args.update and args.json is None:
        raise console.CommandError("--update needs --json FILE")
    if args.avx2:
        forced.check()

    out = console.make_console(WIDTH)
    mismatches: list[str] = []
    if args.results is not None:
        done = results.load(args.results)
    else:
        if not selected:
            raise console.CommandError("no case is selected: --list shows them")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        kept = results.load(args.json) if args.update and args.json.exists() and args.json.stat().st_size else None
        if kept is not None:  # known before the long run, not after it
            kept = results.merged(kept, Run(results.environment(), [], []), cases.CASES)
        done, mismatches = _measured(args, selected, out)
        if kept is not None:
            done = results.merged(kept, done, cases.CASES)
    if args.json is not None:
        console.write_json(args.json, results.to_json(done))
    _show(done, out, rows_only=args.rows_only)
    if args.plot is not None:
        for path in plots.draw(done, args.plot):
            out.print(f"wrote {path}", markup=False)
    for text in mismatches:
        out.print(f"results disagree, not timed: {text}", markup=False, soft_wrap=True)
    regressions = 0 if old is None else _compare(old, done, out)
    return 1 if mismatches or regressions else 0


def _measured(args: argparse.Namespace, selected: Sequence[Case], out: "Console") -> tuple[Run, list[str]]:
    """Runs the cases; the second result names those whose results disagree."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    memory = (not args.quick) if args.memory is None else args.memory
    settings = Settings(
        rounds=min(args.rounds, QUICK.rounds) if args.quick else args.rounds,
        seconds=QUICK.seconds if args.quick else Settings.seconds,
        memory=memory,
        forced_isa=forced.ISA if forced.is_forced() else None,
    )
    providers = [provider for provider in PROVIDERS if args.compile or provider.name != "compile"]
    points: list[results.Point] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    mismatches: list[str] = []
    if args.processes > 1:
        options = [name for name, given in (("--quick", args.quick), ("--compile", args.compile)) if given]
        rows = processes.repeated(selected, args.processes, settings.rounds, memory, options)
    with Progress(*columns, console=out, transient=True) as progress:
        if args.processes == 1:
            rows, mismatches = _rows(selected, providers, settings, progress)
        if args.scaling or args.plot is not None:
            count = sum(1 for _ in scaling.cases(torch.get_num_threads()))
            task = progress.add_task("scaling", total=count)
            try:
                points = scaling.measure_points(providers, lambda share: progress.advance(task, share))
            except Mismatch as error:
                mismatches.append(str(error))
    if args.avx2:
        again = [case for case in selected if forced.applies(case)]
        if again:
            out.print(f"held to {forced.ISA}:", markup=False)
            rows += forced.run(again, settings.rounds, memory).rows
    return Run(results.environment(), rows, points), mismatches


def _rows(
    selected: Sequence[Case], providers: Sequence[Provider], settings: Settings, progress: "Progress"
) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    mismatches: list[str] = []
    task = progress.add_task("", total=len(selected))
    for index, case in enumerate(selected):
        progress.update(task, description=case.key, completed=index)
        try:
            rows.append(measure(case, providers, settings, lambda share: progress.advance(task, share)))
        except Mismatch as error:
            mismatches.append(str(error))
    progress.update(task, completed=len(selected))
    return rows, mismatches


def _show(done: Run, out: "Console", *, rows_only: bool) -> None:
    """The tables."""
    from rich.table import Table

    def table(head: Sequence[str], body: Sequence[Sequence[str]], title: str, numbers: Sequence[int]) -> Table:
        made = Table(title=title, title_justify="left")
        for place, name in enumerate(head):
            made.add_column(name, justify="right" if place in numbers else "left", no_wrap=place > 0)
        for line in body:
            made.add_row(*line)
        return made

    providers = report.shown(done.rows)
    head = report.head(providers)
    body = [report.cells(row, providers) for row in done.rows]
    out.print(table(head, body, report.where(done.environment), range(report.NUMBERS_FROM, len(head))))
    if rows_only:
        return
    out.print(report.NOTES, markup=False)
    limits = ", ".join(report.peak_lines(done.environment))
    if limits:
        out.print(f"This machine's limits with {done.environment['threads']} threads: {limits}.", markup=False)
    for line in report.left_out(done.rows):
        out.print(f"left out: {line}", markup=False)
    noisy = report.disturbed(done.rows)
    if noisy:
        out.print(f"not quiet: measure these again (--case KEY --update): {', '.join(noisy)}", markup=False)
    goals = [report.goal_cells(outcome) for outcome in outcomes(done.rows) if outcome.measured]
    if goals:
        out.print(table(report.GOALS_HEAD, goals, "goals", (2, 3, 4)))


def _compare(old: Run, new: Run, out: "Console") -> int:
    """Prints what has changed; the number of regressions."""
    for name in results.differing(old.environment, new.environment):
        if name != "commit":
            before, after = old.environment.get(name), new.environment.get(name)
            out.print(f"compare: the runs differ in {name}: {before} then, {after} now", markup=False)
    found = results.changes(old, new)
    for change in found:
        word = "REGRESSION" if change.regressed else "faster"
        text = f"{word}: {change.key}: {change.peer} / fastseq {report.ratio(change.before)} then, "
        out.print(text + f"{report.ratio(change.after)} now", markup=False, soft_wrap=True)
    regressions = sum(change.regressed for change in found)
    shared = {(row.forced_isa, row.case) for row in old.rows} & {(row.forced_isa, row.case) for row in new.rows}
    out.print(f"compare: {len(shared)} cases in both runs, {regressions} regressions", markup=False)
    return regressions
