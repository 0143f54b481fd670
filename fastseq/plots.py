"""Pictures of clusterings and autoencoders, drawn with matplotlib and saved as PNG (or what the name's ending says).

No picture needs a display, and none touches pyplot's state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseq._extras import require

_SHOWN = 10_000  # points in an embedding

FilePath = str | os.PathLike[str]


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "cli", "a plot").Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: FilePath) -> Path:
    figure.savefig(path, dpi=110)
    return Path(path)


def _array(values: Any, rank: int, name: str) -> NDArray[Any]:
    """A tensor or array as an array of this rank."""
    made = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if made.ndim != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {list(made.shape)}")
    return made


def plot_embedding(z: Any, labels: Any, path: FilePath, *, centers: Any = None, title: str = "") -> Path:
    """The codes in their two directions of largest variance, coloured by cluster.

    Args:
        z: codes ``[N, m]``, of which at most 10,000 evenly spaced ones are drawn.
        labels: clusters ``[N]``.
        path: where the picture goes.
        centers: ``[K, m]``, drawn as crosses.
        title: above it.
    """
    z, labels = _array(z, 2, "z"), _array(labels, 1, "labels")
    mean = z.mean(0)
    axes = np.linalg.svd(np.cov((z - mean).T).reshape(z.shape[1], -1))[0][:, :2]
    shown = np.linspace(0, len(z) - 1, min(_SHOWN, len(z))).round().astype(int)

    def project(points: NDArray[Any]) -> NDArray[Any]:
        flat = (points - mean) @ axes
        return flat if flat.shape[1] == 2 else np.column_stack([flat, np.zeros(len(flat))])

    figure = _figure(7, 6)
    plot = figure.subplots()
    flat = project(z[shown])
    plot.scatter(
        flat[:, 0], flat[:, 1], c=labels[shown], s=4, cmap="tab10" if labels.max() < 10 else "tab20", alpha=0.6
    )
    if centers is not None:
        flat = project(_array(centers, 2, "centers"))
        plot.scatter(flat[:, 0], flat[:, 1], c="black", marker="x", s=60)
    plot.set(xlabel="first principal direction", ylabel="second", title=title)
    return _save(figure, path)


def plot_history(history: Mapping[str, Sequence[Mapping[str, float]]], path: FilePath) -> Path:
    """The loss of each epoch of pretraining; the loss and the share of points that change cluster at each refresh.

    Args:
        history: ``history_`` of :class:`fastseq.cluster.DEC`.
        path: where the picture goes.
    """
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    left.plot([entry["loss"] for entry in history["pretraining"]], color="#205090")
    left.set(xlabel="epoch", ylabel="mean square", title="Pretraining")
    steps = [entry["step"] for entry in history["clustering"]]
    right.plot(steps, [entry["loss"] for entry in history["clustering"]], color="#205090")
    right.set(xlabel="step", ylabel="KL(P‖Q) per point", title="Clustering")
    changes = right.twinx()
    # The first refresh has nothing to compare with, and a logarithm cannot show a zero.
    changed = [100 * entry["changed"] or math.nan for entry in history["clustering"]][1:]
    changes.plot(steps[1:], changed, color="#f0a050")
    changes.set(ylabel="points that changed cluster, %", yscale="log")
    for plot in (left, right):
        plot.grid(alpha=0.3)
    return _save(figure, path)


def _grid(rows: Sequence[NDArray[Any]], shape: tuple[int, int], path: FilePath, names: Sequence[str]) -> Path:
    """Rows of pictures, one below the other; rows may be of different lengths."""
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (shape[0] + 1), columns * (shape[1] + 1)), np.nan)
    for index, row in enumerate(rows):
        for column, image in enumerate(row):
            top, left = index * (shape[0] + 1), column * (shape[1] + 1)
            canvas[top : top + shape[0], left : left + shape[1]] = image.reshape(shape)
    figure = _figure(0.6 * columns + 1, 0.6 * len(rows) + 0.3)
    plot = figure.subplots()
    plot.imshow(canvas, cmap="gray", interpolation="nearest")
    plot.set_yticks([(index + 0.5) * (shape[0] + 1) for index in range(len(rows))], names)
    plot.set_xticks([])
    plot.spines[:].set_visible(False)
    return _save(figure, path)


def plot_top_examples(x: Any, q: Any, image_shape: tuple[int, int], path: FilePath, *, count: int = 10) -> Path:
    """The points of which each cluster is most confident, one row per cluster, as in the DEC paper's figure 3.

    Args:
        x: images ``[N, rows * columns]``.
        q: soft assignment ``[N, K]``.
        image_shape: rows, columns.
        path: where the picture goes.
        count: images per cluster.
    """
    x, q = _array(x, 2, "x"), _array(q, 2, "q")
    rows = []
    for cluster in range(q.shape[1]):
        best = np.argsort(-q[:, cluster], kind="stable")[:count]
        rows.append(x[best[q[best].argmax(1) == cluster]])
    return _grid(rows, image_shape, path, [str(cluster) for cluster in range(q.shape[1])])


def plot_reconstructions(x: Any, made: Any, image_shape: tuple[int, int], path: FilePath) -> Path:
    """Images ``[N, rows * columns]`` above what an autoencoder made of them, ``[N, rows * columns]``."""
    return _grid([_array(x, 2, "x"), _array(made, 2, "made")], image_shape, path, ["input", "output"])


def plot_interpolation(strip: Any, image_shape: tuple[int, int], path: FilePath) -> Path:
    """The images ``[steps, rows * columns]`` of :meth:`VariationalAutoencoder.interpolate`, side by side."""
    return _grid([_array(strip, 2, "strip")], image_shape, path, [""])
