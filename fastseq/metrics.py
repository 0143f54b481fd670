"""How well clusters agree with classes. Labels are seen here and nowhere else: clustering itself is unsupervised."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq._extras import require

__all__ = ["adjusted_rand_score", "clustering_accuracy", "normalized_mutual_info_score"]  # noqa: F822  # by __getattr__


def clustering_accuracy(labels_true: Any, labels_pred: Any) -> float:
    """The share of points whose cluster is matched to their class, under the best one-to-one matching.

    The matching is found by the Hungarian method (Kuhn 1955, by ``scipy.optimize.linear_sum_assignment``); clusters
    beyond the number of classes match nothing (Xie et al. 2016, eq. 10).

    Args:
        labels_true: ``[N]``, the classes, integers or strings.
        labels_pred: ``[N]``, the clusters, likewise.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: not two one-dimensional arrays of one length of at least 1.
    """
    true, pred = np.asarray(labels_true), np.asarray(labels_pred)
    for name, labels in (("labels_true", true), ("labels_pred", pred)):
        if labels.ndim != 1 or labels.size == 0:
            raise ValueError(f"{name}: expected shape [N] with N at least 1, got {list(labels.shape)}")
    if len(true) != len(pred):
        raise ValueError(f"labels_pred: expected {len(true)} labels, as many as labels_true, got {len(pred)}")
    matching = require("scipy.optimize", "cluster", "clustering_accuracy").linear_sum_assignment
    classes, true = np.unique(true, return_inverse=True)
    clusters, pred = np.unique(pred, return_inverse=True)
    together = np.zeros((len(classes), len(clusters)), dtype=np.int64)
    np.add.at(together, (true, pred), 1)
    return float(together[matching(together, maximize=True)].sum() / len(true))


def __getattr__(name: str) -> Any:
    if name in ("normalized_mutual_info_score", "adjusted_rand_score"):  # scikit-learn's own
        return getattr(require("sklearn.metrics", "cluster", f"fastseq.metrics.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
