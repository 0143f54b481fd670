"""k-means by fastseq and by scikit-learn on the CPU: ``python -m benchmarks.bench_kmeans``.

Whole fits with the same ``n_init`` and k-means++ starts (each its own), and Lloyd's iteration alone from the same
centres, in float32, interleaved. It decides which of the two ``fastseq.cluster.KMeans`` hands arrays to. Writes
``benchmarks/results/kmeans.json`` and, from it, ``kmeans.md``.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sklearn
import sklearn.cluster
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from fastseq.cli.bench.results import environment
from fastseq.cli.timing import interleaved, quantiles
from fastseq.cluster.lloyd import kmeans, lloyd

RESULTS = Path(__file__).parent / "results" / "kmeans.json"
TABLE = RESULTS.with_suffix(".md")
SHAPES = ((1797, 64, 10), (70_000, 10, 10), (20_000, 256, 64))  # N, d, K
TASKS = ("fit, k-means++", "Lloyd alone")
ITERATIONS = 20  # of Lloyd alone
N_INIT = 2


def points(count: int, features: int, k: int) -> tuple[Tensor, Tensor]:
    """A mixture of k normal distributions that overlap, and centres to start from."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(k, features, generator=generator)
    x = means[torch.randint(k, (count,), generator=generator)] + torch.randn(count, features, generator=generator)
    return x, x[torch.randperm(count, generator=generator)[:k]].clone()


def calls(x: Tensor, start: Tensor, task: str) -> dict[str, Callable[[], tuple[float, int]]]:
    """By name; each gives inertia and iterations."""
    array, k = x.numpy(), len(start)

    def theirs(**options: Any) -> tuple[float, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            made = sklearn.cluster.KMeans(k, random_state=0, **options).fit(array)
        return float(made.inertia_), int(made.n_iter_)

    def ours(whole: bool) -> tuple[float, int]:
        made = kmeans(x, k, n_init=N_INIT) if whole else lloyd(x, start, max_iter=ITERATIONS, threshold=0)
        return made.inertia, made.iterations

    if task == TASKS[0]:
        return {"fastseq": lambda: ours(True), "scikit-learn": lambda: theirs(n_init=N_INIT)}
    options = {"init": start.numpy(), "n_init": 1, "max_iter": ITERATIONS, "tol": 0}
    return {"fastseq": lambda: ours(False), "scikit-learn": lambda: theirs(**options)}


def measure(shape: tuple[int, int, int], task: str, rounds: int) -> dict[str, Any]:
    """One row: milliseconds, what came out, and scikit-learn's time over ours within a round."""
    x, start = points(*shape)
    by_name = calls(x, start, task)
    found = {name: call() for name, call in by_name.items()}
    samples = interleaved(by_name, rounds, pools={name: name for name in by_name})
    ratio = [theirs / ours for ours, theirs in zip(samples["fastseq"], samples["scikit-learn"], strict=True)]
    return {
        "shape": list(shape),
        "task": task,
        "rounds": len(ratio),
        "ms": {name: asdict(quantiles([1e3 * value for value in samples[name]])) for name in by_name},
        "ratio": asdict(quantiles(ratio)),
        "inertia": {name: inertia for name, (inertia, _) in found.items()},
        "iterations": {name: iterations for name, (_, iterations) in found.items()},
    }


def render(stored: dict[str, Any]) -> str:
    """The table, and where it was measured."""
    lines = [
        "<!-- written by `python -m benchmarks.bench_kmeans` -->",
        "# k-means on the CPU",
        "",
        "Milliseconds (p20–p80), float32. A fit takes k-means++ starts, each library its own; Lloyd alone begins at "
        "the same centres.",
        "",
        "| N, d, K | | fastseq | scikit-learn | scikit-learn's time over fastseq's | iterations | inertia, fastseq's "
        "over scikit-learn's |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in stored["rows"]:
        ours, theirs = (row["ms"][name] for name in ("fastseq", "scikit-learn"))
        cells = [
            ", ".join(str(size) for size in row["shape"]),
            row["task"],
            *(f"{time['median']:.3g} ({time['p20']:.3g}–{time['p80']:.3g})" for time in (ours, theirs)),
            f"{row['ratio']['median']:.2f} ({row['ratio']['p20']:.2f}–{row['ratio']['p80']:.2f})",
            " / ".join(str(row["iterations"][name]) for name in ("fastseq", "scikit-learn")),
            f"{row['inertia']['fastseq'] / row['inertia']['scikit-learn']:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where = stored["environment"]
    lines += [
        "",
        f"{where['cpu']}, {where['threads']} threads, {where['instruction_set']}, torch {where['torch']}, scikit-learn "
        f"{where['scikit-learn']}, {where['date']}, commit `{where['commit'][:12]}`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures all shapes and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="print the table and write nothing")
    args = parser.parse_args()
    rows = [measure(shape, task, args.rounds) for shape in SHAPES for task in TASKS]
    stored = {"environment": environment() | {"scikit-learn": sklearn.__version__}, "rows": rows}
    text = render(stored)
    print(text)
    if not args.dry:
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
