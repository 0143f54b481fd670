"""k-means of arrays and tensors: against scikit-learn, empty clusters, repeatability, scikit-learn's own checks."""

import numpy as np
import pytest
import sklearn.cluster
import torch
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastseq import ShapeError
from fastseq.cluster import KMeans
from fastseq.cluster.lloyd import centers_of, kmeans, plus_plus
from fastseq.metrics import adjusted_rand_score

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(count=300, k=5, d=4, seed=0, dtype=np.float64):
    x, y = make_blobs(count, d, centers=k, random_state=seed, cluster_std=0.6)
    return x.astype(dtype), y


@parametrize_with_checks([KMeans(n_init=2)])
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_as_good_as_scikit_learn(dtype):
    for seed in range(3):
        x, y = blobs(seed=seed, dtype=dtype)
        theirs = sklearn.cluster.KMeans(5, n_init=10, random_state=0).fit(x)
        for points in (x, torch.from_numpy(x)):
            mine = KMeans(5, n_init=10, random_state=0).fit(points)
            assert mine.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
            assert adjusted_rand_score(y, np.asarray(mine.labels_)) == pytest.approx(
                adjusted_rand_score(y, theirs.labels_), abs=0.02
            )


def test_tensors_stay_tensors():
    x = torch.from_numpy(blobs()[0])
    made = KMeans(5, random_state=0).fit(x)
    for value in (made.labels_, made.cluster_centers_, made.predict(x), made.transform(x)):
        assert isinstance(value, torch.Tensor)
    assert torch.equal(made.predict(x), made.labels_)
    torch.testing.assert_close(made.transform(x).square().min(1).values.sum().item(), made.inertia_)
    assert made.score(x) == pytest.approx(-made.inertia_)
    again = KMeans(5, random_state=0).fit(x)
    assert torch.equal(made.cluster_centers_, again.cluster_centers_)
    with pytest.raises(ShapeError, match="X: expected 4 features"):
        made.predict(x[:, :3])
    with pytest.raises(ValueError, match="X: expected finite numbers"):
        made.predict(x * float("nan"))
    with pytest.raises(ShapeError, match=r"X: expected shape \[N, d\]"):
        KMeans().fit(x[0])


def test_centers_are_means_and_labels_nearest():
    x = torch.from_numpy(blobs()[0])
    found = kmeans(x, 5, tol=0)
    for cluster in range(5):
        torch.testing.assert_close(found.centers[cluster], x[found.labels == cluster].mean(0))
    distance = torch.cdist(x, found.centers)
    assert torch.equal(found.labels, distance.argmin(1))
    assert found.inertia == pytest.approx(distance.min(1).values.square().sum().item())


def test_empty_clusters_move_to_the_farthest_points():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0]])
    labels = torch.tensor([0, 0, 0, 0, 3])
    distance = (x[:, 0] - 0.0).square()
    distance[4] = 900.0  # far from its centre, but alone in its cluster
    centers = centers_of(x, labels, distance, 4)
    assert centers[1].item() == 11.0
    assert centers[2].item() == 10.0
    assert centers[0].item() == 0.5
    assert centers[3].item() == 30.0


def test_as_many_clusters_as_points():
    x = torch.arange(6.0)[:, None]
    found = kmeans(x, 6)
    assert sorted(found.centers.flatten().tolist()) == x.flatten().tolist()
    assert found.inertia == 0
    same = kmeans(torch.ones(8, 2), 3)  # fewer distinct points than clusters
    assert same.inertia == 0


def test_starts_are_spread():
    x = torch.from_numpy(blobs(k=6, d=2)[0])
    worst = max(
        (torch.cdist(x, plus_plus(x, 6, torch.Generator().manual_seed(seed))).min(1).values.square().sum().item())
        for seed in range(5)
    )
    random = [torch.cdist(x, x[torch.randperm(300)[:6]]).min(1).values.square().sum().item() for _ in range(20)]
    assert worst < np.median(random)


def test_refusals():
    x = blobs()[0]
    for options, message in (
        ({"n_clusters": 0}, "n_clusters: expected at least 1"),
        ({"n_clusters": 301}, "n_clusters: expected at most n_samples=300"),
        ({"n_init": 0}, "n_init: expected at least 1"),
        ({"max_iter": 0}, "max_iter: expected at least 1"),
    ):
        for points in (x, torch.from_numpy(x)):
            with pytest.raises(ValueError, match=message):
                KMeans(**options).fit(points)
