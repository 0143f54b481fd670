"""``python -m fastseq bench``: forward and training of the recurrent layers against ``torch.nn``, in one process.

Each case first checks that both give the same results and gradients, by the library's one tolerance rule, and only then
times them, in interleaved rounds. ``benchmarks/`` uses the same cases.
"""

import argparse
import copy
import datetime
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.cli import console
from fastseq.cli.timing import Quantiles, interleaved, quantiles

MODES = ("forward", "training")


@dataclass(frozen=True)
class Case:
    """One shape and kind of layer."""

    op: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    dtype: str = "float32"
    nonlinearity: str = "tanh"  # RNN only
    proj_size: int = 0  # LSTM only
    lengths: bool = False  # sequences of uneven length; torch.nn packs them

    @property
    def kind(self) -> str:
        """What the case is, besides its shape."""
        notes = [self.op if self.op == "lstm" else f"{self.op} {self.nonlinearity}"]
        if self.dtype != "float32":
            notes.append(self.dtype)
        if self.proj_size:
            notes.append(f"proj_size {self.proj_size}")
        if self.lengths:
            notes.append("uneven lengths")
        return ", ".join(notes)

    @property
    def shape(self) -> str:
        """T, B, I, H and layers."""
        return f"{self.T}, {self.B}, {self.I}, {self.H}, {self.layers}"


CASES = (
    Case("lstm", 128, 32, 256, 256),
    Case("lstm", 64, 256, 64, 64),
    Case("lstm", 128, 1, 256, 256),
    Case("lstm", 1, 1, 256, 256),
    Case("lstm", 100, 64, 128, 128, layers=2),
    Case("lstm", 35, 20, 650, 650, layers=2),
    Case("lstm", 1000, 1, 128, 128),
    Case("lstm", 365, 256, 27, 256),
    Case("lstm", 128, 32, 256, 256, lengths=True),
    Case("lstm", 128, 32, 256, 256, proj_size=128),
    Case("lstm", 128, 32, 256, 256, dtype="float64"),
    Case("rnn", 128, 32, 256, 256),
    Case("rnn", 128, 32, 256, 256, nonlinearity="relu"),
    Case("rnn", 64, 256, 64, 64),
    Case("rnn", 1000, 1, 128, 128),
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="time forward and training against torch.nn",
        description="Times the layers of torch.nn and of fastseq in interleaved rounds in one process, after checking "
        "that their results and gradients agree. Exit status 1 when they do not.",
    )
    parser.add_argument("--op", choices=("lstm", "rnn"), action="append", help="only this operation (may be repeated)")
    parser.add_argument("--rounds", type=console.positive_int, default=21, help="samples of each (%(default)s)")
    parser.add_argument("--threads", type=console.positive_int, help="torch.set_num_threads (default: as torch has it)")
    parser.add_argument(
        "--first", type=console.positive_int, metavar="N", help="only the first N cases of what is selected"
    )
    console.add_json_argument(parser)
    parser.set_defaults(run=run)


class Mismatch(Exception):
    """The two libraries disagree, so that there is nothing to time."""


class Pair:
    """The same layer twice, in ``torch.nn`` and in fastseq, with one input."""

    def __init__(self, case: Case) -> None:
        import fastseq

        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        peer: nn.Module
        if case.op == "lstm":
            peer = nn.LSTM(case.I, case.H, case.layers, proj_size=case.proj_size, dtype=dtype)
        else:
            peer = nn.RNN(case.I, case.H, case.layers, nonlinearity=case.nonlinearity, dtype=dtype)
        self.case = case
        self.peer = peer
        self.ours: nn.Module = fastseq.convert(copy.deepcopy(peer))
        self.input = torch.randn(case.T, case.B, case.I, dtype=dtype)
        self.grad_output = torch.randn(case.T, case.B, case.proj_size or case.H, dtype=dtype)
        self.lengths = torch.randint(1, case.T + 1, (case.B,)) if case.lengths else None

    def output(self, layer: nn.Module, input: Tensor) -> Tensor:
        """The output [T, B, P]; ``torch.nn`` takes lengths in the one way it knows, by packing."""
        if self.lengths is None:
            result: Tensor = layer(input)[0]
        elif isinstance(layer, nn.RNNBase):
            packed = nn.utils.rnn.pack_padded_sequence(input, self.lengths, enforce_sorted=False)
            result = nn.utils.rnn.pad_packed_sequence(layer(packed)[0], total_length=self.case.T)[0]
        else:
            result = layer(input, lengths=self.lengths)[0]
        return result

    def forward(self, layer: nn.Module) -> Tensor:
        """Without gradient."""
        with torch.no_grad():
            return self.output(layer, self.input)

    def training(self, layer: nn.Module) -> list[Tensor]:
        """Forward and BPTT: the output, the gradient of the input and those of all weights."""
        dtype = next(layer.parameters()).dtype
        input = self.input.to(dtype).requires_grad_()
        output = self.output(layer, input)
        gradients = torch.autograd.grad(output, [input, *layer.parameters()], self.grad_output.to(dtype))
        return [output.detach(), *gradients]

    def verify(self) -> None:
        """Holds outputs and gradients of both against ``torch.nn`` in float64.

        Raises:
            Mismatch: naming the first tensor that is further off than the tolerance rule allows.
        """
        from fastseq import testing

        truths = self.training(copy.deepcopy(self.peer).double())
        names = ["output", "gradient of the input", *(name for name, _ in self.peer.named_parameters())]
        for name, got, reference, truth in zip(
            names, self.training(self.ours), self.training(self.peer), truths, strict=True
        ):
            found = testing.compare_tensor(name, got, reference, truth)
            if not found.ok:
                raise Mismatch(
                    f"{self.case.kind} {self.case.shape}: {name}: error {found.error:.2e}, allowed {found.allowed:.2e}"
                )

    def calls(self, mode: str) -> dict[str, Callable[[], object]]:
        """What is timed, by library."""
        call = self.forward if mode == "forward" else self.training
        return {"torch": lambda: call(self.peer), "fastseq": lambda: call(self.ours)}


@dataclass(frozen=True)
class Row:
    """The figures of one case in one mode."""

    case: Case
    mode: str
    torch_ms: Quantiles
    fastseq_ms: Quantiles
    ratio: Quantiles  # torch / fastseq within each round: above 1, fastseq is faster


def measure(pair: Pair, mode: str, rounds: int, advance: Callable[[], None] = lambda: None) -> Row:
    """Times one mode of a pair that has been verified."""
    samples = interleaved(pair.calls(mode), rounds, advance)
    ratios = [peer / ours for peer, ours in zip(samples["torch"], samples["fastseq"], strict=True)]
    milliseconds = {name: quantiles([1e3 * value for value in values]) for name, values in samples.items()}
    return Row(pair.case, mode, milliseconds["torch"], milliseconds["fastseq"], quantiles(ratios))


def commit() -> str | None:
    """The commit of the checkout that fastseq runs from, ``+changes`` when files differ from it; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
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


def environment() -> dict[str, Any]:
    """Where the figures come from: stored with them."""
    import fastseq

    facts = fastseq.info()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": facts["cpu"]["model"],
        "cores": facts["cpu"]["cores"],
        "threads": facts["cpu"]["threads"],
        "instruction_set": facts["cpu"]["isa"],
        "backends": {op: devices["cpu"]["backend"] for op, devices in facts["ops"].items()},
        "fastseq": facts["fastseq"],
        "torch": facts["torch"],
        "python": facts["python"],
    }


def run(args: argparse.Namespace) -> int:
    """Runs the cases; 1 when results disagree."""
    console.require("rich", "bench")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out = console.make_console()
    cases = [case for case in CASES if args.op is None or case.op in args.op][: args.first]
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * len(MODES) * args.rounds)
        for case in cases:
            progress.update(task, description=f"{case.kind} {case.shape}")
            pair = Pair(case)
            try:
                pair.verify()
            except Mismatch as error:
                out.print(f"results disagree, nothing timed: {error}", markup=False, soft_wrap=True)
                return 1
            rows.extend(measure(pair, mode, args.rounds, lambda: progress.advance(task)) for mode in MODES)

    facts = environment()
    title = f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']}, torch {facts['torch']}"
    table = Table("layer", "T, B, I, H, layers", "", "torch ms", "fastseq ms", "ratio (p20–p80)", title=title)
    for row in rows:
        table.add_row(*cells(row))
    out.print(table)
    if args.json is not None:
        console.write_json(
            args.json, {"environment": facts, "rounds": args.rounds, "rows": [asdict(row) for row in rows]}
        )
    return 0


def cells(row: Row) -> Sequence[str]:
    """One row of the table, here and in the README."""
    return (
        row.case.kind,
        row.case.shape,
        row.mode,
        f"{row.torch_ms.median:.3g}",
        f"{row.fastseq_ms.median:.3g}",
        f"{row.ratio.median:.2f} ({row.ratio.p20:.2f}–{row.ratio.p80:.2f})",
    )


def row_from_json(data: dict[str, Any]) -> Row:
    """A row as ``--json`` wrote it."""
    spreads = {name: Quantiles(**data[name]) for name in ("torch_ms", "fastseq_ms", "ratio")}
    return Row(case=Case(**data["case"]), mode=data["mode"], **spreads)
