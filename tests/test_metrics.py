"""Clustering accuracy against all matchings, and that the others are scikit-learn's own."""

from itertools import permutations

import numpy as np
import pytest
import sklearn.metrics

from fastseq import metrics


@pytest.mark.parametrize(("classes", "clusters"), [(3, 3), (2, 4), (4, 2), (1, 3)])
def test_best_of_all_matchings(classes, clusters):
    rng = np.random.default_rng(classes * 10 + clusters)
    for _ in range(5):
        true, pred = rng.integers(0, classes, 40), rng.integers(0, clusters, 40)
        size = max(classes, clusters)
        best = max(np.mean(np.array(matching)[pred] == true) for matching in permutations(range(size)))
        assert metrics.clustering_accuracy(true, pred) == pytest.approx(best)


def test_names_do_not_matter():
    true = ["b", "b", "a", "c"]
    assert metrics.clustering_accuracy(true, [100, 100, -3, 7]) == 1.0
    assert metrics.clustering_accuracy(true, [0, 0, 0, 0]) == 0.5


def test_refusals():
    with pytest.raises(ValueError, match=r"labels_true: expected shape \[N\]"):
        metrics.clustering_accuracy([], [])
    with pytest.raises(ValueError, match=r"labels_pred: expected shape \[N\]"):
        metrics.clustering_accuracy([1], [[1]])
    with pytest.raises(ValueError, match="labels_pred: expected 2 labels"):
        metrics.clustering_accuracy([1, 2], [1])


def test_the_others_are_scikit_learns():
    assert metrics.normalized_mutual_info_score is sklearn.metrics.normalized_mutual_info_score
    assert metrics.adjusted_rand_score is sklearn.metrics.adjusted_rand_score
    with pytest.raises(AttributeError, match="no attribute 'purity'"):
        metrics.purity  # noqa: B018
