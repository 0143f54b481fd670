"""Accuracy and seconds of deep embedded clustering: ``python -m benchmarks.bench_dec --data digits --seeds 5``.

One call fills the rows of one data set in ``benchmarks/results/dec.json`` and writes ``benchmarks/results/dec.md``
anew from all that is there: k-means of the data; then, from one pretrained autoencoder per seed, k-means of its codes,
DEC without backpropagation into the encoder, DEC, and IDEC; and ClustPy's DEC with the same layers, epochs and batches
where it is installed. Every seed is in the figures, and labels are used for them only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fastseq import datasets, metrics
from fastseq.autoencoder import DenoisingAutoencoder
from fastseq.cli.bench.results import commit
from fastseq.cluster import DEC, KMeans
from fastseq.cluster.recipes import RECIPES
from fastseq.datasets import Labelled

RESULTS = Path(__file__).parent / "results" / "dec.json"
TABLE = RESULTS.with_suffix(".md")
LOADERS: dict[str, Callable[[Path | None], Labelled]] = {
    "digits": lambda _: datasets.load_digits(),
    "mnist": datasets.load_mnist,
    "reuters21578": datasets.load_reuters21578,
    "reuters10k": datasets.load_reuters10k,
    "reuters": datasets.load_reuters,
    "stl10": datasets.load_stl10_hog,
}
METHODS = ("k-means", "autoencoder + k-means", "DEC without backprop", "DEC", "IDEC", "ClustPy DEC")
PRETRAINING = (
    "hidden_sizes",
    "noise",
    "n_pretrain",
    "pretrain_epochs",
    "pretrain_batch_size",
    "pretrain_optimizer",
    "pretrain_learning_rate",
)
IDEC_WEIGHT = 10.0  # Guo et al. weigh the clustering loss 0.1 against the reconstruction


@dataclass
class Result:
    """One seed of one method. Seconds are those of the method itself; what it shares with others is in ``shared``."""

    method: str
    seed: int
    accuracy: float
    nmi: float
    ari: float
    seconds: float
    shared: float = 0.0


def judge(method: str, seed: int, data: Labelled, labels: Any, seconds: float, shared: float = 0.0) -> Result:
    """The scores of one clustering."""
    return Result(
        method,
        seed,
        metrics.clustering_accuracy(data.labels, labels),
        float(metrics.normalized_mutual_info_score(data.labels, labels)),
        float(metrics.adjusted_rand_score(data.labels, labels)),
        seconds,
        shared,
    )


def pretrained(data: Labelled, recipe: dict[str, Any], seed: int, progress: bool) -> tuple[DenoisingAutoencoder, float]:
    """The autoencoder that the methods of one seed share, and its seconds."""
    start = time.perf_counter()
    model = DEC(**recipe | {"max_iter": 0}, random_state=seed, progress=progress).fit(data.data)
    autoencoder = model.autoencoder_
    assert isinstance(autoencoder, DenoisingAutoencoder)
    return autoencoder, time.perf_counter() - start


def measure(data: Labelled, recipe: dict[str, Any], seed: int, progress: bool) -> list[Result]:
    """All methods of one seed."""
    results = []
    k = recipe["n_clusters"]
    start = time.perf_counter()
    labels = KMeans(k, n_init=20, random_state=seed).fit_predict(np.asarray(data.data))
    results.append(judge(METHODS[0], seed, data, labels, time.perf_counter() - start))

    model, shared = pretrained(data, recipe, seed, progress)
    rest = {name: value for name, value in recipe.items() if name not in PRETRAINING}
    variants: dict[str, dict[str, Any]] = {
        METHODS[1]: {"max_iter": 0},
        METHODS[2]: {"train_encoder": False},
        METHODS[3]: {},
        METHODS[4]: {"reconstruction_weight": IDEC_WEIGHT},
    }
    for method, changes in variants.items():
        start = time.perf_counter()
        fitted = DEC(**rest | changes, autoencoder=model, random_state=seed, progress=progress).fit(data.data)
        results.append(judge(method, seed, data, fitted.labels_, time.perf_counter() - start, shared))
        print(f"  seed {seed}, {method}: {results[-1].accuracy:.4f}, {results[-1].seconds:.1f} s", flush=True)
    return results


def measure_clustpy(data: Labelled, recipe: dict[str, Any], seed: int) -> Result:
    """ClustPy's DEC, pretrained once: the same layers, batches and epochs in both stages, else as ClustPy has it."""
    from clustpy.deep import DEC as Peer
    from clustpy.deep.neural_networks import FeedforwardAutoencoder

    ours = DEC(**recipe)
    x = np.asarray(data.data, np.float32)
    code_size = ours.n_clusters if ours.code_size is None else ours.code_size
    start = time.perf_counter()
    torch.manual_seed(seed)
    network = FeedforwardAutoencoder([x.shape[1], *ours.hidden_sizes, code_size], random_state=seed)
    network.fit(n_epochs=ours.pretrain_epochs, batch_size=ours.pretrain_batch_size, data=x)
    shared = time.perf_counter() - start
    epochs = -(-ours.max_iter // -(-len(x) // ours.batch_size))
    start = time.perf_counter()
    peer = Peer(
        ours.n_clusters,
        batch_size=ours.batch_size,
        neural_network=network,
        embedding_size=code_size,
        clustering_epochs=epochs,
        random_state=seed,
    )
    return judge(METHODS[5], seed, data, peer.fit(x).labels_, time.perf_counter() - start, shared)


def environment() -> dict[str, Any]:
    """Where it was measured, and beside what: far above the number of threads, ``load`` makes the seconds too long."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "commit": commit(),
        "cpu": model.partition(":")[2].strip() or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[2], 1),
        "clustpy": metadata.version("clustpy") if util.find_spec("clustpy") is not None else None,
    }


def rows(name: str, entry: dict[str, Any] | None) -> list[str]:
    """The table's rows of one data set."""
    if entry is None:
        hint = f"`python -m benchmarks.bench_dec --data {name}`"
        return [f"| {name} | all | not measured here: data not available ({hint}) | | | |"]
    made = []
    for method in METHODS:
        results = [Result(**one) for one in entry["results"] if one["method"] == method]
        if not results:
            made.append(f"| {name} | {method} | not measured here: ClustPy is not installed | | | |")
            continue
        accuracy = [100 * one.accuracy for one in results]
        seconds, shared = fmean(one.seconds for one in results), fmean(one.shared for one in results)
        made.append(
            f"| {name} | {method} | {fmean(accuracy):.1f} | {min(accuracy):.1f}–{max(accuracy):.1f} "
            f"| {seconds:.1f}{f' + {shared:.1f} shared' if shared else ''} "
            f"| {', '.join(str(one.seed) for one in results)} |"
        )
    return made


def render(stored: dict[str, Any]) -> str:
    """The table of all data sets, and where each was measured."""
    lines = [
        "<!-- written by `python -m benchmarks.bench_dec` -->",
        "# Clustering accuracy",
        "",
        "Accuracy in percent under the best matching of clusters and classes. Seconds are means over the seeds; the "
        "pretrained autoencoder is shared by the methods of a seed, but for ClustPy, which pretrains its own, once. "
        "All seeds of these runs are in.",
        "",
        "| data | method | mean | range | seconds | seeds |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name in LOADERS:
        lines += rows(name, stored.get(name))
    for name, entry in stored.items():
        where = entry["environment"]
        lines += [
            "",
            f"{name}: {entry['points']:,} points of {entry['features']} features; {where['cpu']}, {where['threads']} "
            f"threads, load average {where.get('load', 'not recorded')}, torch {where['torch']}, "
            f"commit {where['commit']}; {json.dumps(entry['recipe'])}",
        ]
    return "\n".join(lines) + "\n"


def read() -> dict[str, Any]:
    """The stored results of all data sets."""
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return stored


def main(argv: list[str] | None = None) -> int:
    """Measures one data set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_dec", description=__doc__)
    parser.add_argument("--data", choices=tuple(LOADERS), default="digits")
    parser.add_argument("--data-dir", type=Path, help="where the data set is (FASTSEQ_DATA)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … N - 1 (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="further seeds join those that are stored")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--no-peer", action="store_true", help="leave ClustPy out")
    peer.add_argument("--peer-only", action="store_true", help="add ClustPy to seeds that are stored without it")
    parser.add_argument("--progress", action="store_true", help="show bars")
    args = parser.parse_args(argv)
    data, recipe = LOADERS[args.data](args.data_dir), dict(RECIPES[args.data])
    stored = read()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with_peer = not args.no_peer and util.find_spec("clustpy") is not None
    if args.peer_only:
        if not with_peer:
            parser.error("--peer-only: ClustPy is not installed (pip install clustpy)")
        entry = stored.get(args.data, {})
        if json.dumps(entry.get("recipe")) != json.dumps(recipe):
            parser.error(f"--peer-only: {RESULTS} has no results of {args.data} by today's recipe")
        entry["environment"]["clustpy"] = environment()["clustpy"]
        entry["results"] = [one for one in entry["results"] if one["method"] != METHODS[5] or one["seed"] not in seeds]
    else:
        entry = {
            "environment": environment(),
            "recipe": recipe,
            "points": data.data.shape[0],
            "features": data.data.shape[1],
            "results": [],
        }
        if args.first_seed and args.data in stored:
            entry["results"] = [one for one in stored[args.data]["results"] if one["seed"] < args.first_seed]
    for seed in seeds:
        results = [] if args.peer_only else measure(data, recipe, seed, args.progress)
        if with_peer:
            results.append(measure_clustpy(data, recipe, seed))
        entry["results"] += [asdict(result) for result in results]
        # After each seed, since the runs are long, and beside what a run of other data has written meanwhile.
        stored = read() | {args.data: entry}
        entry["environment"]["load"] = max(entry["environment"]["load"], environment()["load"])
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        TABLE.write_text(render(stored))
    print("\n".join(rows(args.data, stored[args.data])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
