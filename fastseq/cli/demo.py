"""``python -m fastseq demo``: a character model trained with ``torch.nn.LSTM`` and with fastseq, then a clustering.

Both models start from the same weights and see the same batches. They train in alternate blocks of steps, and which of
them goes first changes from block to block, so that a machine that slows down or speeds up does so for both. The text
is the help on Python's own topics, which every CPython carries (``pydoc_data.topics``, 0.46 MB).
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastseq.cli import console
from fastseq.cli.timing import Quantiles, quantiles
from fastseq.models.text import Vocabulary

BLOCK = 10  # steps that one model trains before the other's turn
CHECKED = 10  # first steps whose losses must agree to rounding
BATCH = 32
WINDOW = 64  # characters per sequence
EMBEDDING = 64
LEARNING_RATE = 4e-3
HELD_OUT = 0.05  # share of the text, its end, that neither model trains on

if TYPE_CHECKING:
    from rich.console import Console

State = tuple[Tensor, Tensor]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="train a character model with torch.nn.LSTM and with fastseq, side by side; then cluster digits",
        description="Trains a two-layer character language model on English text, with torch.nn.LSTM and with the same "
        "model passed through fastseq.convert: same weights, same batches, alternate blocks of steps. Prints both loss "
        "curves, the speed ratio and a sample of generated text, and draws them. Exit status 1 when the first losses "
        "differ by more than rounding. Then it clusters scikit-learn's handwritten digits by deep embedded clustering, "
        "as `python -m fastseq dec` does, into a folder beside the picture.",
    )
    parser.add_argument(
        "--steps", type=console.positive_int, default=400, help="training steps per model (%(default)s)"
    )
    parser.add_argument("--hidden", type=console.positive_int, default=256, help="hidden size (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and sample (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=console.positive_float,
        default=80.0,
        help="stop training early, both models at the same step, when this time is used up (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default="demo.png", help="where the picture goes (%(default)s)"
    )
    parser.add_argument("--only", choices=("recurrent", "clustering"), help="one of the two acts")
    console.add_json_argument(parser)
    parser.set_defaults(run=run)


class CharacterModel(nn.Module):
    """Embedding, two recurrent layers, and a linear read-out to one logit per character."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.recurrent = nn.LSTM(EMBEDDING, hidden, num_layers=2)
        self.read_out = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens int64 [T, B] -> logits [T, B, V] and the recurrent state, which continues the text when passed in."""
        output, state = self.recurrent(self.embedding(tokens), state)
        return self.read_out(output), state


@dataclass
class Text:
    """The characters as numbers, and the way back."""

    alphabet: list[str]
    train: Tensor  # int64 [N]
    held_out: Tensor  # int64 [M]

    @classmethod
    def load(cls) -> "Text":
        """Reads ``pydoc_data.topics``; a CommandError where a Python has been stripped of it."""
        text = console.default_text("the demo")
        vocabulary = Vocabulary.of_characters(text)
        tokens = vocabulary.encode(text)
        cut = int(len(tokens) * (1.0 - HELD_OUT))
        return cls(list(vocabulary.tokens), tokens[:cut], tokens[cut:])

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random windows: tokens and the characters that follow them, each int64 [WINDOW, BATCH]."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(WINDOW + 1)[:, None]
        while True:
            starts = torch.randint(len(self.train) - WINDOW, (BATCH,), generator=generator)
            window = self.train[starts + offsets]
            yield window[:-1], window[1:]


@dataclass
class Trainer:
    """A model in training, with the loss and the time of each step."""

    name: str
    model: CharacterModel
    losses: list[float] = field(default_factory=list)  # nats per character
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """One training step, timed whole: forward, backward, clipping and Adam."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model, tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        value = loss.item()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value)

    @property
    def timing(self) -> Quantiles:
        """Seconds a step, without the first block, which warms caches and allocators up."""
        return quantiles(self.seconds[BLOCK:] or self.seconds)

    def held_out_loss(self, text: Text) -> float:
        """Nats per character on the text that it has not seen."""
        columns = (len(text.held_out) - 1) // WINDOW
        length = columns * WINDOW
        tokens = text.held_out[:length].view(columns, WINDOW).t()
        targets = text.held_out[1 : length + 1].view(columns, WINDOW).t()
        with torch.no_grad():
            return cross_entropy(self.model, tokens, targets).item()


def cross_entropy(model: CharacterModel, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per character."""
    logits, _ = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def generate(model: CharacterModel, text: Text, prompt: str, length: int, seed: int, temperature: float = 0.6) -> str:
    """``prompt`` continued by ``length`` characters drawn from the model, one streaming step each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[text.alphabet.index(character)] for character in prompt])  # [T, 1]
    characters = list(prompt)
    state: State | None = None
    with torch.no_grad():
        for _ in range(length):
            logits, state = model(tokens, state)
            probabilities = torch.softmax(logits[-1, 0] / temperature, dim=0)
            drawn = int(torch.multinomial(probabilities, 1, generator=generator))
            characters.append(text.alphabet[drawn])
            tokens = torch.tensor([[drawn]])
    return "".join(characters)


@dataclass
class Agreement:
    """How far the two loss curves are apart over the first steps, and how far rounding lets them be.

    The rule is the one that every kernel of this library is held to (``fastseq.testing``), applied to the losses: what
    bounds fastseq's distance from the same training in float64 is ``torch.nn``'s own.
    """

    steps: int
    difference: float  # max |fastseq - torch|
    error: float  # max |fastseq - float64|
    torch_error: float  # max |torch - float64|
    allowed: float
    ok: bool


def agreement(converted: Trainer, baseline: Trainer, truth: Trainer) -> Agreement:
    """Compares the curves over the steps that ``truth``, the float64 model, has made."""
    from fastseq import testing

    steps = len(truth.losses)
    exact = torch.tensor(truth.losses, dtype=torch.float64)
    ours, theirs = (torch.tensor(trainer.losses[:steps], dtype=torch.float32) for trainer in (converted, baseline))
    found = testing.compare_tensor("loss", ours, theirs, exact)
    difference, torch_error = ((theirs.double() - other).abs().max().item() for other in (ours.double(), exact))
    return Agreement(steps, difference, found.error, torch_error, found.allowed, found.ok)


def train(
    trainers: list[Trainer], text: Text, steps: int, seed: int, budget: float, advance: Callable[[], None]
) -> None:
    """Trains all ``trainers`` on the same batches in alternate blocks, until ``steps`` or the next round of blocks
    would go over the budget of seconds. ``advance`` is called after each step of each trainer."""
    batches = text.batches(seed)
    start = time.perf_counter()
    done = rounds = 0
    while done < steps:
        elapsed = time.perf_counter() - start
        if rounds and elapsed + elapsed / rounds > budget:
            return
        block = [next(batches) for _ in range(min(BLOCK, steps - done))]
        for trainer in trainers if rounds % 2 == 0 else reversed(trainers):
            for tokens, targets in block:
                trainer.step(tokens, targets)
                advance()
        done += len(block)
        rounds += 1


def sparkline(values: list[float], low: float, high: float) -> str:
    """The curve as one line of block characters."""
    blocks = "▁▂▃▄▅▆▇█"
    scale = (len(blocks) - 1) / max(high - low, 1e-12)
    return "".join(blocks[min(max(round((value - low) * scale), 0), len(blocks) - 1)] for value in values)


def stretches(length: int, count: int) -> list[slice]:
    """``range(length)`` cut into ``count`` (at most ``length``) pieces of nearly equal size."""
    count = min(count, length)
    return [slice(length * index // count, length * (index + 1) // count) for index in range(count)]


def draw(path: Path, baseline: Trainer, converted: Trainer, ratio: float) -> None:
    """Both loss curves, and characters per second as bars (whiskers from the 20th to the 80th percentile)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2.2, 1), layout="constrained")
    curves.plot(baseline.losses, color="#f0a050", linewidth=4, alpha=0.7, label=baseline.name)
    curves.plot(converted.losses, color="#205090", linewidth=1, label=converted.name)
    curves.set(xlabel="step", ylabel="loss, nats per character", title="Same weights, same batches")
    curves.grid(alpha=0.3)
    curves.legend()
    for position, (trainer, color) in enumerate(((baseline, "#f0a050"), (converted, "#205090"))):
        time = trainer.timing
        rates = [BATCH * WINDOW / seconds / 1e3 for seconds in (time.median, time.p80, time.p20)]
        errors = [[rates[0] - rates[1]], [rates[2] - rates[0]]]
        bars.bar(position, rates[0], width=0.6, color=color, yerr=errors, capsize=6, ecolor="#404040")
    bars.set_xticks([0, 1], [baseline.name, converted.name])
    bars.set(ylabel="thousand characters per second", title=f"Training, {ratio:.2f} times")
    bars.grid(alpha=0.3, axis="y")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise console.CommandError(f"cannot write {path}: {error}") from None
    finally:
        pyplot.close(figure)


def print_curves(out: "Console", trainers: list[Trainer]) -> None:
    """Both loss curves together, as a table and as one line each."""
    from rich.table import Table

    steps = len(trainers[0].losses)
    table = Table(
        "steps", *(f"{trainer.name}, loss" for trainer in trainers), "largest difference", title="Loss curves"
    )
    for part in stretches(steps, 10):
        first, second = (trainer.losses[part] for trainer in trainers)
        apart = max(abs(x - y) for x, y in zip(first, second, strict=True))
        table.add_row(f"{part.start + 1}–{part.stop}", f"{fmean(first):.4f}", f"{fmean(second):.4f}", f"{apart:.1e}")
    out.print(table)
    means = [[fmean(trainer.losses[part]) for part in stretches(steps, 48)] for trainer in trainers]
    low, high = min(map(min, means)), max(map(max, means))
    for trainer, curve in zip(trainers, means, strict=True):
        out.print(f"{trainer.name:>8} {sparkline(curve, low, high)} {trainer.losses[-1]:.3f}", soft_wrap=True)


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 1 when the first losses differ by more than rounding."""
    status = 0 if args.only == "clustering" else run_recurrent(args)
    if args.only != "recurrent":
        run_clustering(args.out.with_name(f"{args.out.stem}-clusters"), args.seed)
    return status


def run_clustering(folder: Path, seed: int) -> None:
    """The second act: ``python -m fastseq dec`` with no options but these."""
    from fastseq.cli.main import build_parser

    args = build_parser().parse_args(["dec", "--out", str(folder), "--seed", str(seed), "--fresh"])
    args.run(args)


def run_recurrent(args: argparse.Namespace) -> int:
    """The first act; 1 when the first losses differ by more than rounding."""
    import fastseq

    console.require("rich", "the demo")
    console.require("matplotlib", "the demo")
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise console.CommandError(f"--out: expected a name that ends in .png, .pdf or .svg, got {args.out}")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    out = console.make_console()
    facts = fastseq.info()
    served = facts["ops"]["lstm"]["cpu"]
    text = Text.load()
    torch.manual_seed(args.seed)
    model = CharacterModel(len(text.alphabet), args.hidden)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    out.print(
        f"A two-layer character model, {args.hidden} hidden units, {parameters:,} parameters, float32; "
        f"{len(text.train):,} characters of English from pydoc_data.topics.\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"fastseq {fastseq.__version__}, lstm on the CPU: {served['backend']} ({served['why']}).\n"
        f"The models train in alternate blocks of {BLOCK} steps on the same batches."
    )

    truth = Trainer("float64", copy.deepcopy(model).double())
    converted = Trainer("fastseq", fastseq.convert(copy.deepcopy(model)))
    baseline = Trainer("nn.LSTM", model)
    trainers = [baseline, converted]
    checked = min(CHECKED, args.steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as progress:
        yardstick = progress.add_task("float64 yardstick", total=checked)
        train([truth], text, checked, args.seed, math.inf, lambda: progress.advance(yardstick))
        training = progress.add_task("training both", total=2 * args.steps)
        train(trainers, text, args.steps, args.seed, args.seconds, lambda: progress.advance(training))
    steps = len(baseline.losses)
    if steps < args.steps:
        out.print(f"Stopped after {steps} of {args.steps} steps: the budget of {args.seconds:g} s is used up.")

    agreed = agreement(converted, baseline, truth)
    held_out = {trainer.name: trainer.held_out_loss(text) for trainer in trainers}
    ratio = baseline.timing.median / converted.timing.median
    sample = generate(converted.model, text, "The ", 320, args.seed)

    print_curves(out, trainers)
    out.print(
        f"First {agreed.steps} steps: the losses differ by at most {agreed.difference:.1e} nats. Against the same "
        f"training in float64: nn.LSTM {agreed.torch_error:.1e}, fastseq {agreed.error:.1e}, "
        f"allowed {agreed.allowed:.1e}: "
        + ("[green]they agree to rounding[/]." if agreed.ok else "[bold red]they do not agree[/].")
    )
    out.print("Later, rounding differences grow as in any two trainings that differ by one bit.")
    out.print("Text neither has seen: " + ", ".join(f"{name} {loss:.3f}" for name, loss in held_out.items()) + " nats.")
    for trainer in trainers:
        spread = trainer.timing
        out.print(
            f"{trainer.name:>8}: {spread.median * 1e3:.1f} ms a step, the median "
            f"({spread.p20 * 1e3:.1f}–{spread.p80 * 1e3:.1f} from the 20th to the 80th percentile)"
        )
    out.print(f"[bold]Speed of a whole training step, fastseq against nn.LSTM: {ratio:.2f} times[/]")
    out.rule("written by the fastseq model")
    out.print(sample, markup=False)
    out.rule()

    draw(args.out, baseline, converted, ratio)
    out.print(f"Curves and throughput: {args.out}")
    if args.json is not None:
        results = {
            "settings": {
                "steps": steps,
                "hidden": args.hidden,
                "seed": args.seed,
                "batch": BATCH,
                "window": WINDOW,
                "block": BLOCK,
            },
            "info": facts,
            "losses": {trainer.name: trainer.losses for trainer in trainers},
            "step_seconds": {trainer.name: asdict(trainer.timing) for trainer in trainers},
            "ratio": ratio,
            "held_out": held_out,
            "agreement": asdict(agreed),
            "sample": sample,
        }
        console.write_json(args.json, results)
    return 0 if agreed.ok else 1
