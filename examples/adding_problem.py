"""The adding problem (Hochreiter & Schmidhuber 1997, section 5.4): who can remember two numbers over T steps?

At each of T steps comes a number from [0, 1] and a mark, which is 1 at two steps, one in each half of the sequence, and
else 0. The answer is the sum of the two marked numbers. Who always answers 1 has the mean squared error 1/6 = 0.167. A
tanh network's gradient vanishes on the way; the identity (Le et al. 2015) and the LSTM carry it.

Prints a table and draws the curves: python examples/adding_problem.py --out adding.png
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseq.init import identity_
from fastseq.models import SequenceEncoder

NAMES = {"tanh": "tanh RNN", "relu": "IRNN (relu, identity)", "lstm": "LSTM"}
CHANCE, LEARNT = 1 / 6, 0.01


def batch(steps: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [T, B, 2] and answers [B]."""
    numbers = torch.rand(steps, size, generator=generator)
    half = steps // 2
    places = torch.stack([torch.randint(half, (size,), generator=generator) + part * half for part in (0, 1)])
    marks = torch.zeros(steps, size).scatter_(0, places, 1.0)
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(0)


def make(cell: str, hidden: int) -> nn.Module:
    """The encoder with a linear answer; each as its authors start it."""
    encoder = SequenceEncoder(2, hidden, cell=cell)
    if cell == "relu":
        identity_(encoder.recurrent, input_std=1e-3)
    if cell == "lstm":
        with torch.no_grad():  # remember at first (Gers et al. 2000; Jozefowicz et al. 2015)
            encoder.recurrent.bias_hh_l0[hidden : 2 * hidden] = 1.0
    return nn.Sequential(encoder, nn.Linear(hidden, 1), nn.Flatten(0))


def train(cell: str, args: argparse.Namespace) -> tuple[list[float], float]:
    """The mean squared error on fresh sequences every ``args.every`` steps, and the seconds in all."""
    torch.manual_seed(args.seed)
    model = make(cell, args.hidden)
    generator = torch.Generator().manual_seed(args.seed)
    x, y = batch(args.length, 512, torch.Generator().manual_seed(args.seed + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    errors, start = [], time.perf_counter()
    for step in range(args.steps + 1):
        if step % args.every == 0:
            with torch.no_grad():
                errors.append(nn.functional.mse_loss(model(x), y).item())
            if errors[-1] < LEARNT / 2:
                break  # it has learnt; the curve would stay where it is
        some, wanted = batch(args.length, args.batch, generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(some), wanted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
    return errors, time.perf_counter() - start


def draw(curves: dict[str, list[float]], args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for cell, errors in curves.items():
        axes.semilogy([index * args.every for index in range(len(errors))], errors, label=NAMES[cell])
    axes.axhline(CHANCE, color="grey", linestyle=":", label="always 1")
    axes.set(xlabel="training steps", ylabel="mean squared error", title=f"The adding problem, T = {args.length}")
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=200, help="T (%(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps at most (%(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations (%(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam (%(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="norm of the gradient (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the picture goes, if anywhere")
    args = parser.parse_args()
    curves = {}
    print(f"| cell | lowest error after {args.steps} steps at most | steps to {LEARNT} | seconds |\n|---|---|---|---|")
    for cell, name in NAMES.items():
        curves[cell], seconds = train(cell, args)
        learnt = next((index * args.every for index, error in enumerate(curves[cell]) if error < LEARNT), "never")
        print(f"| {name} | {min(curves[cell]):.4f} | {learnt} | {seconds:.0f} |", flush=True)
    if args.out is not None:
        draw(curves, args)


if __name__ == "__main__":
    main()
