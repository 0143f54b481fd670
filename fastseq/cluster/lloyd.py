"""k-means of a tensor where it is: k-means++, Lloyd's iteration on the fused assignment, empty clusters moved."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq._seeds import generator
from fastseq.ops.nearest_center import nearest_center


class Clustering(NamedTuple):
    """A result of k-means."""

    centers: Tensor  # [K, d]
    labels: Tensor  # int64 [N]
    inertia: float  # the sum of squared distances to the centre that is nearest
    iterations: int


def kmeans(x: Tensor, k: int, *, n_init: int = 10, max_iter: int = 300, tol: float = 1e-4, seed: int = 0) -> Clustering:
    """The best of ``n_init`` runs of Lloyd's k-means, by inertia, each from a k-means++ start of its own.

    Args:
        x: points, ``[N, d]``, float32 or float64, any device.
        k: clusters, at most N.
        n_init: runs.
        max_iter: iterations of a run.
        tol: a run ends when no label changes, or when the centres move by less than this, squared and summed, in units
            of the mean variance of the features (as scikit-learn).
        seed: of the starts.
    """
    threshold = tol * x.var(0, correction=0).mean().item()
    runs = (_run(x, k, max_iter, threshold, generator(seed, run, device=x.device)) for run in range(n_init))
    return min(runs, key=lambda run: run.inertia)


def _run(x: Tensor, k: int, max_iter: int, threshold: float, random: torch.Generator) -> Clustering:
    return lloyd(x, plus_plus(x, k, random), max_iter=max_iter, threshold=threshold)


def lloyd(x: Tensor, centers: Tensor, *, max_iter: int, threshold: float) -> Clustering:
    """Lloyd's iteration from given centres.

    Args:
        x: ``[N, d]``.
        centers: ``[K, d]``.
        max_iter: iterations, at most.
        threshold: it ends when the centres move by no more than this, squared and summed, or no label changes.
    """
    k = len(centers)
    labels, distance = nearest_center(x, centers)
    iterations = 0
    while iterations < max_iter:
        iterations += 1
        moved = centers_of(x, labels, distance, k)
        shift = (moved - centers).square().sum().item()
        centers = moved
        before = labels
        labels, distance = nearest_center(x, centers)
        if shift <= threshold or torch.equal(before, labels):
            break
    return Clustering(centers, labels, distance.sum(dtype=torch.float64).item(), iterations)


def centers_of(x: Tensor, labels: Tensor, distance: Tensor, k: int) -> Tensor:
    """The mean of each cluster ``[K, d]``; an empty one moves to a point that is farthest from its centre.

    Args:
        x: ``[N, d]``.
        labels: ``[N]``.
        distance: ``[N]``, of each point from its centre.
        k: clusters.
    """
    counts = torch.bincount(labels, minlength=k)
    if not bool(counts.all()):
        empty = (counts == 0).nonzero().flatten()
        # A point that is alone in its cluster stays, or another one would be empty.
        movable = torch.where(counts[labels] > 1, distance, -1.0)
        labels = labels.clone()
        for cluster in empty.tolist():
            farthest = int(movable.argmax())
            if movable[farthest] < 0:
                break
            counts[labels[farthest]] -= 1
            counts[cluster] += 1
            movable[farthest] = -1.0
            # Those that are alone now stay too.
            if counts[labels[farthest]] == 1:
                movable[labels == labels[farthest]] = -1.0
            labels[farthest] = cluster
    # In double precision, so that the mean of many points is as good as that of few.
    sums = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device).index_add_(0, labels, x.double())
    return (sums / counts.clamp(min=1)[:, None]).to(x.dtype)


def plus_plus(x: Tensor, k: int, random: torch.Generator) -> Tensor:
    """Starting centres ``[k, d]``, far apart (Arthur & Vassilvitskii 2007), with ``2 + log k`` trials each."""
    count = len(x)
    trials = 2 + int(math.log(k))

    def draw(weights: Tensor, number: int) -> Tensor:
        """Rows drawn with these chances; torch.multinomial takes 2^24 of them at most."""
        total = weights.cumsum(0, dtype=torch.float64)
        at = torch.rand(number, generator=random, dtype=torch.float64, device=x.device) * total[-1]
        return torch.searchsorted(total, at, right=True).clamp(max=count - 1)

    chosen = x[draw(x.new_ones(count), 1)]
    closest = (x - chosen).square().sum(1)
    for _ in range(k - 1):
        candidates = x[draw(closest, trials)]
        distances = torch.stack([torch.minimum(closest, nearest_center(x, row[None])[1]) for row in candidates])
        best = distances.sum(1, dtype=torch.float64).argmin()
        closest = distances[best]
        chosen = torch.cat([chosen, candidates[best][None]])
    return chosen
