"""``python -m fastseq dec``: clusters a data set or a file; writes labels, model, pictures and a one-page report."""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastseq.cli import console

if TYPE_CHECKING:
    from fastseq.cluster import DEC
    from fastseq.datasets import Labelled

NAMES = ("digits", "mnist", "reuters21578", "reuters10k", "reuters", "stl10")
SHOWN = 10  # pictures in a row


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "dec",
        help="cluster a data set by deep embedded clustering",
        description="Deep embedded clustering: pretrains an autoencoder, finds centres by k-means of its codes, and "
        "trains both together. Writes labels.csv, centers.npy, history.json, pictures, the model (model.safetensors, "
        "for fastseq.cluster.DEC.load) and report.md. With no options it clusters scikit-learn's digits. Labels that a "
        "data set has are used in the report only. Ctrl-C leaves a checkpoint; the same command goes on from it. "
        "Under torchrun the processes share each batch.",
        epilog=f"What is not given is as fastseq.cluster.recipes says for the data set ({', '.join(NAMES)}), else as "
        "fastseq.cluster.DEC says.",
    )
    source = parser.add_argument_group("data")
    source.add_argument(
        "--data", default="digits", metavar="NAME", help=f"one of {', '.join(NAMES)}, or FILE.npy [N, d] (%(default)s)"
    )
    source.add_argument("--labels", type=Path, metavar="FILE", help="classes [N] of FILE.npy, for the report")
    source.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data set is (FASTSEQ_DATA)")
    result = parser.add_argument_group("results")
    result.add_argument(
        "--out",
        dest="folder",
        type=Path,
        metavar="DIR",
        default=Path("dec"),
        help="folder of the results (%(default)s)",
    )
    result.add_argument("--fresh", action="store_true", help="start anew where DIR has a checkpoint")
    console.add_json_argument(result)
    model = parser.add_argument_group("model")
    model.add_argument("--clusters", dest="n_clusters", type=console.positive_int, metavar="K")
    model.add_argument(
        "--hidden", dest="hidden_sizes", type=console.positive_int, nargs="+", metavar="WIDTH", help="of the encoder"
    )
    model.add_argument("--code", dest="code_size", type=console.positive_int, metavar="M", help="numbers in a code")
    model.add_argument("--alpha", type=console.positive_float, help="degrees of freedom")
    model.add_argument(
        "--reconstruction",
        dest="reconstruction_weight",
        type=float,
        metavar="W",
        help="above 0: IDEC (10 is the paper's)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--seed", dest="random_state", type=int, default=0, help="(%(default)s)")
    training.add_argument("--epochs", dest="pretrain_epochs", type=console.positive_int, help="of pretraining")
    training.add_argument("--pretrain-batch", dest="pretrain_batch_size", type=console.positive_int, metavar="B")
    training.add_argument("--steps", dest="max_iter", type=console.positive_int, help="of the joint training, at most")
    training.add_argument("--batch", dest="batch_size", type=console.positive_int, metavar="B")
    training.add_argument(
        "--update-interval", type=console.positive_int, metavar="STEPS", help="between refreshes of P"
    )
    training.add_argument("--tol", type=console.positive_float, help="stop when fewer change cluster")
    training.add_argument("--target", choices=("stored", "streamed"))
    training.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.set_defaults(run=run)


ARGUMENTS = (
    "n_clusters", "hidden_sizes", "code_size", "alpha", "reconstruction_weight", "random_state", "pretrain_epochs",
    "pretrain_batch_size", "max_iter", "batch_size", "update_interval", "tol", "target", "precision",
)  # fmt: skip


@dataclass
class Outcome:
    """What the report says of a clustering; the scores are None where there are no classes."""

    data: str
    points: int
    features: int
    clusters: int
    seed: int
    seconds: float
    steps: int
    converged: bool
    sizes: list[int]
    scores: dict[str, dict[str, float]] | None


def load(args: argparse.Namespace) -> "Labelled":
    """The data set that is asked for; a file's labels are all zero where none are given."""
    from fastseq import datasets

    loaders: dict[str, Callable[[], Labelled]] = {
        "digits": datasets.load_digits,
        "mnist": lambda: datasets.load_mnist(args.data_dir),
        "reuters21578": lambda: datasets.load_reuters21578(args.data_dir),
        "reuters10k": lambda: datasets.load_reuters10k(args.data_dir),
        "reuters": lambda: datasets.load_reuters(args.data_dir),
        "stl10": lambda: datasets.load_stl10_hog(args.data_dir),
    }
    if args.data in loaders:
        if args.labels is not None:
            raise console.CommandError(f"--labels: {args.data} has its own")
        return loaders[args.data]()
    if not args.data.endswith(".npy"):
        raise console.CommandError(f"--data: expected one of {', '.join(NAMES)} or FILE.npy, got {args.data}")
    try:
        data = np.load(args.data, mmap_mode="r")
        labels = None if args.labels is None else np.load(args.labels)
    except (OSError, ValueError) as error:
        raise console.CommandError(f"--data: cannot read {args.data}: {error}") from None
    if data.ndim != 2:
        raise console.CommandError(f"--data: expected an array [N, d] in {args.data}, got {list(data.shape)}")
    if labels is not None and labels.shape != data.shape[:1]:
        raise console.CommandError(f"--labels: expected shape [{len(data)}], got {list(labels.shape)}")
    numbers = np.zeros(len(data), np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    names = () if labels is None else tuple(map(str, np.unique(labels)))
    return datasets.Labelled(data, numbers, names)


@contextmanager
def processes() -> Iterator[bool]:
    """Joins the other processes under torchrun; whether this one is the first, which writes."""
    import torch
    from torch import distributed

    from fastseq.autoencoder.ranks import leave

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield distributed.get_rank() == 0
    finally:
        leave()


def scores(labels: Any, clusters: Any) -> dict[str, float]:
    """Accuracy, NMI and ARI."""
    from fastseq import metrics

    return {
        "accuracy": metrics.clustering_accuracy(labels, clusters),
        "NMI": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "ARI": float(metrics.adjusted_rand_score(labels, clusters)),
    }


def estimator(args: argparse.Namespace, progress: bool) -> "DEC":
    """DEC with the recipe of the data set and what the command line says otherwise."""
    from fastseq.cluster import DEC
    from fastseq.cluster.recipes import RECIPES

    given = {name: getattr(args, name) for name in ARGUMENTS if getattr(args, name) is not None}
    path = args.folder / "model.safetensors"
    return DEC(**RECIPES.get(args.data, {}) | given, checkpoint=path, checkpoint_interval=20.0, progress=progress)


def cluster(args: argparse.Namespace, data: "Labelled", first: bool = True) -> tuple["DEC", Outcome]:
    """Fits the estimator and judges the result."""
    from fastseq.cluster import KMeans

    model = estimator(args, progress=first)
    start = time.perf_counter()
    try:
        model.fit(data.data)
    except ValueError as error:
        raise console.CommandError(str(error)) from None
    seconds = time.perf_counter() - start
    judged = None
    if data.names and first:
        plain = KMeans(model.n_clusters, random_state=model.random_state).fit(data.data)
        judged = {"k-means of the data": scores(data.labels, plain.labels_)}
        judged["DEC"] = scores(data.labels, model.labels_)
    sizes = np.bincount(model.labels_, minlength=model.n_clusters).tolist()
    return model, Outcome(
        Path(args.data).name,
        data.data.shape[0],
        data.data.shape[1],
        model.n_clusters,
        model.random_state,
        seconds,
        model.n_iter_,
        model.converged_,
        sizes,
        judged,
    )


def write(folder: Path, model: "DEC", data: "Labelled", outcome: Outcome) -> list[Path]:
    """Labels, centres, history and pictures; returns the pictures."""
    from fastseq import plots

    q = model.soft_assign(data.data)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("point", "cluster", "confidence"))
        # The estimator's labels, not the largest q: two may round to the same number.
        labels = model.labels_.tolist()
        rows.writerows((index, own, f"{q[index, own]:.6f}") for index, own in enumerate(labels))
    np.save(folder / "centers.npy", model.cluster_centers_)
    (folder / "history.json").write_text(json.dumps(model.history_, indent=1) + "\n")
    z = model.transform(data.data)
    title = f"{outcome.data}, {outcome.clusters} clusters"
    pictures = [
        plots.plot_embedding(z, model.labels_, folder / "embedding.png", centers=model.cluster_centers_, title=title),
        plots.plot_history(model.history_, folder / "history.png"),
    ]
    if data.image_shape is not None:
        some = np.asarray(data.data[np.linspace(0, len(z) - 1, SHOWN).astype(int)])
        made = model.autoencoder_.reconstruct(some)
        pictures += [
            plots.plot_top_examples(data.data, q, data.image_shape, folder / "top.png", count=SHOWN),
            plots.plot_reconstructions(some, made, data.image_shape, folder / "reconstructions.png"),
        ]
    return pictures


def report(model: "DEC", outcome: Outcome, pictures: list[Path]) -> str:
    """The page, in Markdown."""
    import fastseq

    how = "when fewer than tol changed cluster" if outcome.converged else "at the largest number of steps"
    lines = [
        f"# Deep embedded clustering of {outcome.data}",
        "",
        f"{outcome.points:,} points of {outcome.features} features, {outcome.clusters} clusters, seed {outcome.seed}. "
        f"{outcome.seconds:.0f} s in this run, {len(model.history_['pretraining'])} epochs of pretraining, "
        f"{outcome.steps} steps of clustering, which ended {how}. fastseq {fastseq.__version__}.",
        "",
    ]
    if outcome.scores is not None:
        lines += ["| | accuracy | NMI | ARI |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {row['accuracy']:.4f} | {row['NMI']:.4f} | {row['ARI']:.4f} |"
            for name, row in outcome.scores.items()
        ]
        lines += ["", "The classes were used for these scores only.", ""]
    lines += ["| cluster | points |", "|---|---|"]
    lines += [f"| {index} | {size} |" for index, size in enumerate(outcome.sizes)]
    for picture in pictures:
        lines += ["", f"![{picture.stem}]({picture.name})"]
    lines += ["", "Settings:", "", "```", str(model), "```", ""]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Runs the clustering; 0, or 2 when it cannot be done."""
    for package in ("rich", "matplotlib"):
        console.require(package, "dec")
    for package in ("sklearn", "scipy", "tqdm", "safetensors"):
        console.require(package, "dec", "cluster")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        console.check_writable(args.folder / "report.md")
    except OSError as error:
        raise console.CommandError(f"--out: cannot make the folder {args.folder}: {error.strerror}") from None
    with processes() as first:
        if args.fresh and first:
            (args.folder / "model.safetensors").unlink(missing_ok=True)
        outcome = perform(args, first)
    if args.json is not None and first:
        console.write_json(args.json, vars(outcome))
    return 0


def perform(args: argparse.Namespace, first: bool = True) -> Outcome:
    """Loads, clusters, writes and prints."""
    out = console.make_console()
    try:
        data = load(args)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise console.CommandError(str(error)) from None
    try:
        model, outcome = cluster(args, data, first)
    except KeyboardInterrupt:
        out.print(f"Stopped. The same command goes on from {args.folder / 'model.safetensors'}.", markup=False)
        raise
    if first:
        pictures = write(args.folder, model, data, outcome)
        (args.folder / "report.md").write_text(report(model, outcome, pictures), encoding="utf-8")
        for name, row in (outcome.scores or {}).items():
            out.print(f"{name:>20}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()), markup=False)
        out.print(
            f"{outcome.points:,} points in {outcome.clusters} clusters, {outcome.seconds:.0f} s, {outcome.steps} steps"
            f"{', converged' if outcome.converged else ''}. Report: {args.folder / 'report.md'}",
            markup=False,
        )
    return outcome
