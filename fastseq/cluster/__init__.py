"""Clustering as scikit-learn does it: estimators with fit, predict and transform, over fastseq's fused operations."""

from __future__ import annotations

from fastseq._extras import require

require("sklearn.base", "cluster", "fastseq.cluster")

from fastseq.cluster.dec import DEC  # noqa: E402
from fastseq.cluster.kmeans import KMeans  # noqa: E402

__all__ = ["DEC", "KMeans"]
