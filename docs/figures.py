"""Draws the pictures of docs/ that no example draws: python docs/figures.py (a minute; --steps N for less)."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import fastseq
from fastseq import plots
from fastseq.autoencoder import DenoisingAutoencoder, VariationalAutoencoder
from fastseq.cluster import DEC
from fastseq.cluster.recipes import RECIPES
from fastseq.datasets import load_digits
from fastseq.models import LanguageModel, LanguageModelTrainer, TrainingSettings, Vocabulary
from fastseq.models.text import python_documentation

IMAGES = Path(__file__).parent / "images"


def unrolled(path: Path) -> None:
    """A network over six steps, cut into two windows."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-0.9, 5.9), ylim=(-0.4, 2.4))
    arrow = {"arrowstyle": "-|>", "color": "black"}
    for t in range(6):
        for height, name in enumerate(("x", "h", "y")):
            box = {"boxstyle": "circle", "facecolor": "white"}
            axes.text(t, height, f"${name}_{t + 1}$", ha="center", va="center", bbox=box)
        for height, name in ((0, "U"), (1, "V")):
            axes.annotate("", (t, height + 0.75), (t, height + 0.25), arrowprops=arrow)
            axes.text(t + 0.08, height + 0.5, name, fontsize=8, va="center")
        if t:
            axes.annotate("", (t - 0.22, 1), (t - 0.78, 1), arrowprops=arrow)
            axes.text(t - 0.5, 1.1, "W", fontsize=8, ha="center")
            if t != 3:
                back = {"arrowstyle": "-|>", "color": "tab:red", "linestyle": "--"}
                axes.annotate("", (t - 0.78, 0.82), (t - 0.22, 0.82), arrowprops=back)
    axes.axvline(2.5, color="tab:red", linewidth=1)
    axes.text(2.5, 2.32, "the state passes, the gradient (red) does not", ha="center", va="top", fontsize=8)
    figure.savefig(path, dpi=100)


def lstm_gates(path: Path, steps: int = 60) -> None:
    """One unit, set by hand to write its input where it is marked and to keep it elsewhere."""
    lstm = fastseq.LSTM(2, 1)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        # Rows i, f, g, o; columns value, mark. A mark opens the input gate and shuts the forget gate.
        lstm.weight_ih_l0.copy_(torch.tensor([[0.0, 16.0], [0.0, -16.0], [2.0, 0.0], [0.0, 0.0]]))
        lstm.bias_ih_l0.copy_(torch.tensor([-8.0, 8.0, 0.0, 4.0]))
    generator = torch.Generator().manual_seed(2)
    value, mark = 2 * torch.rand(steps, generator=generator) - 1, torch.zeros(steps)
    mark[[5, 20, 45]] = 1
    with torch.no_grad():
        _, _, states = lstm(torch.stack([value, mark], dim=1), return_states=True)
    figure = Figure(figsize=(6, 3), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot(value, color="lightgrey", label="input")
    above.plot(states.c[0, :, 0], label="cell c")
    above.plot(states.h[0, :, 0], label="hidden h")
    for index, name in ((0, "input gate i"), (1, "forget gate f"), (3, "output gate o")):
        below.plot(states.gates[0, :, index], label=name)
    below.set_xlabel("step t")
    for axes in (above, below):
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def language_model(path: Path, steps: int) -> None:
    """Training and validation of a small character model."""
    text = python_documentation()
    vocabulary = Vocabulary.of_characters(text)
    tokens = vocabulary.encode(text)
    cut = int(0.95 * len(tokens))
    torch.manual_seed(0)
    model = LanguageModel(len(vocabulary), 32, 64)
    settings = TrainingSettings(batch=16, window=32, epochs=8, learning_rate=5e-3, evaluate_every=max(1, steps // 20))
    trainer = LanguageModelTrainer(model, vocabulary, tokens[:cut], tokens[cut:], settings)
    history = trainer.run(on_evaluation=lambda record: record["step"] >= steps)
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    at = [record["step"] for record in history]
    bits = torch.tensor([record["training_nats"] for record in history]) / torch.log(torch.tensor(2.0))
    axes.plot(at, bits, label="training")
    axes.plot(at, [record["bits_per_character"] for record in history], label="held out")
    axes.set(xlabel="training steps", ylabel="bits per character")
    axes.legend()
    figure.savefig(path, dpi=100)


def autoencoders(folder: Path, epochs: int) -> None:
    """Digits without a fifth of their pixels and what is made of them; the way from one digit to another."""
    x = torch.as_tensor(load_digits().data, dtype=torch.float32)
    torch.manual_seed(0)
    denoising = DenoisingAutoencoder(64, (256,), 32, level=0.2)
    denoising.fit(x, epochs=epochs, seed=0, progress=False)
    shown = x[:8] * (torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) >= 0.2)
    plots.plot_reconstructions(shown, denoising.reconstruct(shown), (8, 8), folder / "reconstructions.png")
    variational = VariationalAutoencoder(64, (256,), 10, likelihood="bernoulli")
    variational.fit(x, epochs=epochs, seed=0, progress=False)
    plots.plot_interpolation(variational.interpolate(x[0], x[1]), (8, 8), folder / "interpolation.png")


def clustering(folder: Path, steps: int) -> None:
    """The digits' codes before and after the joint training."""
    digits = load_digits()
    recipe = dict(RECIPES["digits"]) | {"n_pretrain": 1, "random_state": 0}
    recipe["pretrain_epochs"] = min(steps, recipe["pretrain_epochs"])
    before = DEC(**recipe | {"max_iter": 0}).fit(digits.data)
    after = DEC(**recipe | {"max_iter": min(steps, recipe["max_iter"])}, autoencoder=before.autoencoder_).fit(
        digits.data
    )
    for model, when in ((before, "before"), (after, "after")):
        codes = model.autoencoder_.encode(digits.data)
        path = folder / f"codes_{when}.png"
        title = f"{when} the joint training"
        plots.plot_embedding(codes, model.labels_, path, centers=model.cluster_centers_, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of training, at most (%(default)s)")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR", help="where the pictures go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    unrolled(args.out / "unrolled.png")
    lstm_gates(args.out / "lstm_gates.png")
    language_model(args.out / "language_model.png", args.steps)
    autoencoders(args.out, min(args.steps, 100))
    clustering(args.out, args.steps)


if __name__ == "__main__":
    main()
