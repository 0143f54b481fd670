"""k-means as an estimator: scikit-learn's own for arrays, fastseq's for tensors, which it leaves where they are."""

from __future__ import annotations

from typing import Any, Self

import sklearn.cluster
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from fastseq.cluster.inputs import as_tensor, checked, like, seed_of
from fastseq.cluster.lloyd import kmeans
from fastseq.ops.nearest_center import nearest_center

_FLOATS = ("float64", "float32")


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """k-means++ with ``n_init`` restarts and Lloyd's iteration; empty clusters move to the farthest points.

    For arrays the centres are found by scikit-learn's KMeans; for tensors by :func:`fastseq.cluster.lloyd.kmeans`, on
    their device. Assignments are :func:`fastseq.functional.nearest_center`: of several nearest centres the lowest.

    Args:
        n_clusters: K.
        n_init: runs, the best of which is kept.
        max_iter: iterations of a run.
        tol: of the centres' movement, relative to the variance of the data.
        random_state: a seed, a ``numpy.random.RandomState``, or None.

    Attributes:
        cluster_centers_: ``[K, d]``.
        labels_: ``[N]``.
        inertia_: the sum of squared distances to the nearest centres.
        n_iter_: iterations of the best run.
        n_features_in_: d.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        n_init: int = 10,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Finds the centres of ``X [N, d]``, an array or a tensor. ``y`` is ignored.

        Raises:
            ValueError: an argument out of range, fewer points than clusters, or numbers that are not finite.
        """
        X = self._checked(X, reset=True)
        for name in ("n_clusters", "n_init", "max_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if len(X) < self.n_clusters:
            raise ValueError(f"n_clusters: expected at most n_samples={len(X)}, got {self.n_clusters}")
        options: dict[str, Any] = {"n_init": self.n_init, "max_iter": self.max_iter, "tol": self.tol}
        if isinstance(X, Tensor):
            found = kmeans(X, self.n_clusters, seed=seed_of(self.random_state), **options)
            self.cluster_centers_, self.n_iter_ = found.centers, found.iterations
        else:
            theirs = sklearn.cluster.KMeans(self.n_clusters, random_state=self.random_state, **options).fit(X)
            self.cluster_centers_, self.n_iter_ = theirs.cluster_centers_, theirs.n_iter_
        labels, distance = self._nearest(X)
        self.labels_ = like(labels, X)
        self.inertia_ = distance.sum(dtype=torch.float64).item()
        return self

    def predict(self, X: Any) -> Any:
        """The nearest centre of each point: ``[N]``."""
        X = self._fitted(X)
        return like(self._nearest(X)[0], X)

    def transform(self, X: Any) -> Any:
        """Distances to the centres: ``[N, K]``."""
        X = self._fitted(X)
        return like(torch.cdist(as_tensor(X), self._centers(X), compute_mode="donot_use_mm_for_euclid_dist"), X)

    def score(self, X: Any, y: Any = None) -> float:
        """The negative inertia of ``X``."""
        return -float(self._nearest(self._fitted(X))[1].sum(dtype=torch.float64).item())

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def _checked(self, X: Any, reset: bool) -> Any:
        X = checked(self, X, reset=reset, dtype=_FLOATS)
        return X if not isinstance(X, Tensor) or X.is_floating_point() else X.float()

    def _fitted(self, X: Any) -> Any:
        check_is_fitted(self)
        return self._checked(X, reset=False)

    def _centers(self, X: Any) -> Tensor:
        x = as_tensor(X)
        return as_tensor(self.cluster_centers_).to(x.device, x.dtype)

    def _nearest(self, X: Any) -> tuple[Tensor, Tensor]:
        return nearest_center(as_tensor(X), self._centers(X))
