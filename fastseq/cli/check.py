"""``python -m fastseq check``: every operation, implementation, instruction set and dtype against a float64 reference.

It runs on the user's own machine what the tests run elsewhere, by the same rule (``fastseq.testing.compare``).
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastseq.cli import console

RECURRENCES = ("lstm", "rnn")
OPERATIONS = (*RECURRENCES, "student_t_assignment", "target_distribution", "clustering_loss", "nearest_center")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "check",
        help="compare every operation, backend and dtype with the float64 reference",
        description="Compares results and gradients of every operation, implementation, instruction set and dtype that "
        "can run on this machine with the reference in float64. Exit status 1 on a mismatch.",
    )
    parser.add_argument("--op", choices=OPERATIONS, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this dtype (may be repeated)")
    console.add_json_argument(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Target:
    """One thing to check: all cases of an operation, by one implementation, in one dtype."""

    op: str
    implementation: str
    isa: str | None  # only the C++ kernels have several
    dtype: str

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.op, self.implementation, self.isa, self.dtype)))


@dataclass
class Outcome:
    """What the comparisons of one target came to."""

    target: Target
    cases: int = 0
    tensors: int = 0
    worst: float = 0.0  # the largest error as a share of what is allowed
    worst_at: str = ""
    failures: list[str] = field(default_factory=list)


# A case is judged over several draws together, so many that its states have NUMBERS elements: a tensor of a few may be
# right by luck in the reference, and luck is no standard. A loss is one number a draw.
DRAWS, LOSSES, NUMBERS = 4, 16, 256


Cases = Iterator[tuple[str, list[dict[str, Any]]]]


def cases(op: str) -> Cases:
    """Name and draws of float64 inputs of each case of an operation."""
    return recurrence_cases(op) if op in RECURRENCES else clustering_cases(op)


def recurrence_cases(op: str) -> Cases:
    """Plain, odd sizes, one step, one unit, no bias, lengths, resets, …

    Weights are drawn as ``torch.nn`` initialises them.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1

    def inputs(T: int, B: int, I: int, H: int, **options: Any) -> list[dict[str, Any]]:
        return [one(T, B, I, H, **options) for _ in range(max(DRAWS, NUMBERS // (B * H)))]

    def one(T: int, B: int, I: int, H: int, bias: bool = True, P: int | None = None, **options: Any) -> dict[str, Any]:
        gates = 4 if op == "lstm" else 1
        out = P or H
        made: dict[str, Any] = {"x": random(T, B, I), "h0": random(B, out)}
        if op == "lstm":
            made["c0"] = random(B, H)
        bound = H**-0.5
        made |= {"w_ih": random(gates * H, I) * bound, "w_hh": random(gates * H, out) * bound}
        if bias:
            made |= {"b_ih": random(gates * H) * bound, "b_hh": random(gates * H) * bound}
        if P is not None:
            made["w_hr"] = random(P, H) * bound
        return made | options

    lengths = torch.tensor([9, 0, 4, 1, 7])
    reset = torch.rand(9, 5, generator=generator) < 0.3
    yield "plain", inputs(9, 5, 24, 32)
    yield "one of everything", inputs(1, 1, 1, 1)
    yield "odd sizes", inputs(5, 3, 63, 65)
    yield "more odd sizes", inputs(4, 7, 17, 130)
    yield "no bias", inputs(9, 5, 8, 20, bias=False)
    yield "reverse", inputs(9, 5, 24, 32, reverse=True)
    yield "lengths", inputs(9, 5, 24, 33, lengths=lengths)
    yield "resets", inputs(9, 5, 24, 33, reset=reset)
    yield "lengths, resets, reverse", inputs(9, 5, 24, 33, lengths=lengths, reset=reset, reverse=True)
    if op == "lstm":
        yield "projection", inputs(9, 5, 24, 32, P=13)
        yield "projection, lengths, reverse", inputs(9, 5, 24, 32, P=13, lengths=lengths, reverse=True)
    if op == "rnn":
        yield "relu", inputs(9, 5, 24, 33, nonlinearity="relu")
        yield "sigmoid", inputs(9, 5, 24, 33, nonlinearity="sigmoid")


def option_cases(op: str) -> Iterator[tuple[str, tuple[str, ...], list[dict[str, Any]]]]:
    """Name, options of :data:`fastseq.ops.dispatch.OPTIONS`, and draws of inputs, of each option of a recurrence."""
    if op not in RECURRENCES:
        return
    T, B, H = 9, 5, 33
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1

    plain = next(draws for name, draws in recurrence_cases(op) if name == "lengths, resets, reverse")
    states = (random(B, H), random(B, H)) if op == "lstm" else random(B, H)
    per_step = (random(T, B, H), random(T, B, H)) if op == "lstm" else random(T, B, H)
    given: list[tuple[str, str, dict[str, Any]]] = [
        ("reset_state", "reset state", {"reset_state": states}),
        ("reset_state", "reset states of every step", {"reset_state": per_step}),
        ("h_mask", "recurrent dropout", {"h_mask": (random(B, H) < 0.4).double() / 0.7}),
        ("grad_clip", "gradient clip", {"grad_clip": 0.3}),
        ("recompute", "recompute", {"recompute": True}),
    ]
    if op == "lstm":
        masks = {name: random(T, B, H) < -0.4 for name in ("zoneout_h", "zoneout_c")}
        norms = {"weight_ln_c": random(H), "bias_ln_c": random(H)}
        haste = {name: random(4 * H) for name in ("weight_ln_ih", "weight_ln_hh")}
        torchaudio = {name: random(4 * H) for name in ("weight_ln_gates", "bias_ln_gates")}
        given += [
            ("zoneout", "zoneout", masks),
            ("zoneout", "zoneout, expected", {"zoneout_h": 0.3, "zoneout_c": 0.2}),
            ("peephole", "peepholes", {"peephole": random(3, H)}),
            ("cell_clip", "cell clip", {"cell_clip": 0.3}),
            ("return_states", "all states", {"return_states": True}),
            ("layer_norm", "layer normalisation, haste", haste | norms),
            ("layer_norm", "layer normalisation, torchaudio", torchaudio | norms),
        ]
    for option, name, arguments in given:
        yield name, (option, "lengths", "reset"), [draw | arguments for draw in plain]


def clustering_cases(op: str) -> Cases:
    """Plain, odd sizes, one of everything, other degrees of freedom, a target and frequencies."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def one(N: int, d: int, K: int, by: str, options: dict[str, Any]) -> dict[str, Any]:
        if op == "target_distribution":
            made = {"q": random(N, K).softmax(-1)}
        else:
            scale = min(1.0, 2 / d**0.5)  # else all distances would be nearly the same where d is large
            made = {"z": scale * (2 * random(N, d) - 1), "centers": scale * (2 * random(K, d) - 1)}
        if by == "target":
            made["target"] = random(N, K).softmax(-1)
        if by == "freq":
            made["freq"] = N / K * (0.5 + random(K))
        return made | options

    takes_alpha = op in ("student_t_assignment", "clustering_loss")
    ways = {"clustering_loss": ("target", "freq"), "target_distribution": ("", "freq")}.get(op, ("",))
    for by in ways:
        for alpha in (1.0, 0.5, 5.0) if takes_alpha else (None,):
            for name, sizes in (
                ("plain", (200, 10, 10)),
                ("one of everything", (1, 1, 1)),
                ("odd sizes", (63, 65, 130)),
                ("more odd sizes", (130, 3, 17)),
            ):
                words = [name, *([f"alpha {alpha:g}"] if alpha else []), *([by] if by else [])]
                options = {"alpha": alpha} if alpha else {}
                least = LOSSES if op == "clustering_loss" else DRAWS
                count = max(least, NUMBERS // (sizes[0] * min(sizes[1:])))
                yield ", ".join(words), [one(*sizes, by, options) for _ in range(count)]


def targets(operations: list[str], dtypes: list[str]) -> Iterator[Target]:
    """Everything that can run on this machine."""
    from fastseq import cpu, testing

    for op in operations:
        for implementation in testing.implementations(op):
            for isa in cpu.isas() if implementation == "cpp" else [None]:
                for dtype in dtypes:
                    yield Target(op, implementation, isa, dtype)


def examine(target: Target) -> Outcome:
    """Runs all cases of one target. An exception in an implementation is a failure like a wrong number."""
    from contextlib import nullcontext

    from fastseq import cpu, testing

    outcome = Outcome(target)
    of_options = [
        (name, inputs)
        for name, options, inputs in option_cases(target.op)
        if target.implementation in testing.implementations(target.op, options=options)
    ]
    with cpu.use_isa(target.isa) if target.isa is not None else nullcontext():
        for name, inputs in (*cases(target.op), *of_options):
            outcome.cases += 1
            try:
                comparisons = testing.compare(
                    target.op, inputs, implementation=target.implementation, dtype=DTYPES[target.dtype]
                )
            except Exception as error:
                outcome.failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            for comparison in comparisons:
                outcome.tensors += 1
                share = comparison.error / comparison.allowed
                if not share <= outcome.worst:  # so that NaN is the worst of all
                    outcome.worst, outcome.worst_at = share, f"{name}: {comparison.name}"
                if not comparison.ok:
                    outcome.failures.append(
                        f"{name}: {comparison.name}: error {comparison.error:.2e}, allowed {comparison.allowed:.2e}"
                    )
    return outcome


def run(args: argparse.Namespace) -> int:
    """Runs the comparisons; 1 when one of them fails."""
    console.require("rich", "check")
    from rich.progress import track
    from rich.table import Table

    import fastseq

    out = console.make_console()
    facts = fastseq.info()
    todo = list(targets(args.op or list(OPERATIONS), args.dtype or list(DTYPES)))
    outcomes = [examine(target) for target in track(todo, "comparing", console=out, transient=True)]

    table = Table("op", "backend", "isa", "dtype", "cases", "tensors", "error/allowed", "")
    for outcome in outcomes:
        table.add_row(
            outcome.target.op,
            outcome.target.implementation,
            outcome.target.isa or "–",
            outcome.target.dtype,
            str(outcome.cases),
            str(outcome.tensors),
            f"{outcome.worst:.2f}",
            "[bold red]WRONG[/]" if outcome.failures else "[green]ok[/]",
        )
    out.print(table)
    failures = [f"{outcome.target}: {failure}" for outcome in outcomes for failure in outcome.failures]
    for failure in failures:
        out.print(failure, markup=False, soft_wrap=True)
    tensors = sum(outcome.tensors for outcome in outcomes)
    if facts["cpu"]["why_unavailable"] is not None:
        out.print(f"The C++ kernels were not checked: {facts['cpu']['why_unavailable']}", markup=False)
    out.print(f"{tensors} tensors compared, {len(failures)} mismatches.")
    if args.json is not None:
        console.write_json(
            args.json, {"ok": not failures, "info": facts, "outcomes": [asdict(outcome) for outcome in outcomes]}
        )
    return 1 if failures else 0
