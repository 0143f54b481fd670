"""Deep embedded clustering: scikit-learn's checks, the paper's formulas, inputs of all kinds, kill and resume."""

import copy
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dec_cases import SMALL, points, results
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastseq import checkpoint
from fastseq._seeds import Noise, generator
from fastseq.autoencoder import Autoencoder, VariationalAutoencoder
from fastseq.autoencoder.points import Points
from fastseq.cluster import DEC
from fastseq.cluster.joint import Joint, Settings
from fastseq.metrics import adjusted_rand_score, clustering_accuracy

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes):
    return DEC(**SMALL | changes)


@parametrize_with_checks([DEC(**SMALL | {"pretrain_epochs": 30, "max_iter": 30})])
def test_scikit_learn(estimator, check):
    check(estimator)


def settings(**changes):
    values = {"alpha": 1.0, "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0, "batch_size": 150}
    values |= {"update_interval": 5, "tol": 0.0, "max_iter": 5, "target": "stored", "reconstruction_weight": 0.0}
    values |= {
        "train_encoder": True,
        "precision": "float32",
        "seed": 0,
        "corruption": "gaussian",
        "clustering_noise": 0.0,
    }
    return Settings(**values | changes)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("target", ["stored", "streamed"])
def test_a_step_follows_the_formulas(alpha, target):
    """Frequencies, target, loss and both gradients as the paper writes them, over the whole data as one batch."""
    x = torch.from_numpy(points(dtype=np.float64)[0])
    torch.manual_seed(0)
    model = Autoencoder(8, (), 3).double()
    centers = torch.randn(4, 3, dtype=torch.float64)
    weight, bias = model.encoder[0].weight.detach().clone(), model.encoder[0].bias.detach().clone()
    joint = Joint(model, centers, Points(x, torch.float64), settings(alpha=alpha, target=target))
    joint.refresh()
    joint.step()

    z = x @ weight.T + bias
    difference = z[:, None] - centers
    closeness = 1 / (1 + difference.square().sum(2) / alpha)
    u = closeness ** ((alpha + 1) / 2)
    q = u / u.sum(1, keepdim=True)
    p = q.square() / q.sum(0)
    p /= p.sum(1, keepdim=True)
    dz = ((alpha + 1) / alpha * closeness * (p - q))[:, :, None] * difference / len(x)
    torch.testing.assert_close(joint.history[0]["loss"], (p * (p / q).log()).sum().item() / len(x))
    torch.testing.assert_close(joint.centers, centers + 0.1 * dz.sum(0))
    torch.testing.assert_close(model.encoder[0].weight.detach(), weight - 0.1 * dz.sum(1).T @ x)
    torch.testing.assert_close(model.encoder[0].bias.detach(), bias - 0.1 * dz.sum((0, 1)))


def test_reconstruction_beside_the_clustering():
    x = torch.from_numpy(points(dtype=np.float64)[0])
    models, joints = [], []
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        models.append(Autoencoder(8, (5,), 3).double())
        centers = torch.randn(4, 3, dtype=torch.float64)
        joints.append(Joint(models[-1], centers, Points(x, torch.float64), settings(reconstruction_weight=weight)))
    torch.manual_seed(0)
    plain = Autoencoder(8, (5,), 3).double()
    (2.0 * (plain(x) - x).square().mean()).backward()
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    for joint in joints:
        joint.refresh()
        joint.step()
    for start, own, dec, idec in zip(before, plain.parameters(), *(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(idec - start, (dec - start) - 0.1 * own.grad)


def test_noise_in_the_joint_training():
    """The noisy points are pulled to the target of the points themselves; the decoder gives the points themselves."""
    x = torch.from_numpy(points(dtype=np.float64)[0])
    torch.manual_seed(0)
    model = Autoencoder(8, (5,), 3).double()
    centers = torch.randn(4, 3, dtype=torch.float64)
    chosen = settings(clustering_noise=0.3, reconstruction_weight=2.0)
    joint = Joint(copy.deepcopy(model), centers, Points(x, torch.float64), chosen)
    joint.refresh()
    target, order = joint.target, torch.randperm(len(x), generator=generator(0, 3, 0))
    joint.step()

    clean = x[order]
    z = model.code(clean + 0.3 * Noise(generator(0, 4, 0), 0, len(x)).normal(clean))
    u = 1 / (1 + (z[:, None] - centers).square().sum(2))
    p = target[order]
    kl = (p * (p * u.sum(1, keepdim=True) / u).log()).sum() / len(x)
    (kl + 2.0 * (model.decoded(z) - clean).square().mean()).backward()
    for got, start in zip(joint.autoencoder.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.detach(), start.detach() - 0.1 * start.grad)


def test_centers_only():
    x = points()[0]
    model = small(train_encoder=False, max_iter=20).fit(x)
    start = small(train_encoder=False, max_iter=0).fit(x)
    for got, first in zip(model.autoencoder_.parameters(), start.autoencoder_.parameters(), strict=True):
        assert torch.equal(got, first)
    assert not np.array_equal(model.cluster_centers_, start.cluster_centers_)


def test_finds_blobs():
    x, y = points(300)
    for changes in (
        {},
        {"target": "streamed"},
        {"reconstruction_weight": 10.0},
        {"optimizer": "adam"},
        {"clustering_noise": 0.2},
        {"pretrain_optimizer": "sgd", "pretrain_learning_rate": 0.1},
    ):
        model = small(pretrain_epochs=60, max_iter=200, tol=0.001, **changes).fit(x)
        assert clustering_accuracy(y, model.labels_) > 0.95
        assert model.converged_
        assert 0 < model.n_iter_ < 200
        losses = [entry["loss"] for entry in model.history_["clustering"]]
        assert losses[-1] < losses[0] or "reconstruction_weight" in changes


def test_what_it_gives():
    x, _ = points()
    model = small().fit(x)
    q = model.soft_assign(x)
    assert q.shape == (150, 3)
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)
    z = model.transform(x)
    u = 1 / (1 + ((z[:, None] - model.cluster_centers_) ** 2).sum(2))
    np.testing.assert_allclose(q, u / u.sum(1, keepdims=True), rtol=1e-4)
    assert np.array_equal(q.argmax(1), model.predict(x))
    assert np.array_equal(model.labels_, model.predict(x))
    assert np.array_equal(model.predict_proba(x[:5]), model.soft_assign(x[:5]))
    assert model.score(x) == pytest.approx(-model.history_["clustering"][-1]["loss"], rel=1e-3)
    assert model.n_iter_ == 40
    assert not model.converged_
    assert [entry["step"] for entry in model.history_["clustering"]] == list(range(0, 41, 5))
    assert len(model.history_["pretraining"]) == 10
    assert np.array_equal(small().fit_predict(x), model.labels_)


def test_takes_the_pretraining_that_agrees_with_the_others(monkeypatch):
    """One of three autoencoders is made to be useless: it is not taken, wherever it stands."""
    x, y = points()
    whole = DEC._make_autoencoder
    for bad in range(3):
        made = iter(range(-1, 3))  # the first that is made holds the parameters of the one that is taken

        def make(self, points, seed, made=made, bad=bad):
            model = whole(self, points, seed)
            if next(made) == bad:
                for parameter in model.parameters():
                    parameter.data.zero_().requires_grad_(False)
                model.encoder[-1].weight.data[0, 0] = 1e-3
                model.terms = lambda x, noise: {"none": torch.zeros((), requires_grad=True)}
            return model

        monkeypatch.setattr(DEC, "_make_autoencoder", make)
        model = small(n_pretrain=3, pretrain_epochs=60, max_iter=0).fit(x)
        assert clustering_accuracy(y, model.labels_) > 0.9
        assert len(model.history_["pretraining"]) == 60


def test_pipeline_and_clone():
    x, _ = points()
    pipeline = clone(make_pipeline(StandardScaler(), small()))
    labels = pipeline.fit_predict(x)
    assert np.array_equal(pipeline.predict(x), labels)
    model = clone(small(alpha=2.0))
    assert model.get_params() == small(alpha=2.0).get_params()


def test_every_holder_of_points_gives_the_same(tmp_path):
    x, _ = points()
    np.save(tmp_path / "x.npy", x)
    expected = results(small().fit(x))
    for held in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.utils.data.TensorDataset(torch.from_numpy(x))):
        for got, wanted in zip(results(small().fit(held)), expected, strict=True):
            assert np.array_equal(got, wanted)
    model = small().fit(torch.from_numpy(x))
    assert isinstance(model.labels_, torch.Tensor)
    assert isinstance(model.soft_assign(torch.from_numpy(x)), torch.Tensor)
    assert np.array_equal(model.labels_.numpy(), expected[0])


class Recording(torch.utils.data.Dataset):
    """Rows made when they are asked for, and how many were asked for at a time."""

    def __init__(self, count):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.sin(torch.arange(1.0, 9.0) * index)

    def __getitems__(self, indices):
        self.asked.append(len(indices))
        return [self[index] for index in indices]


def test_data_larger_than_memory_come_a_batch_at_a_time():
    data = Recording(5000)
    model = small(target="streamed", pretrain_epochs=1, max_iter=3).fit(data)
    assert model.labels_.shape == (5000,)
    assert max(data.asked) <= 2048
    assert sum(data.asked) < 6 * 5000  # pretraining, centres, two refreshes, labels


def test_given_autoencoder_is_copied():
    x, _ = points()
    torch.manual_seed(0)
    given = VariationalAutoencoder(8, (6,), 2, likelihood="gaussian")
    given.fit(x, epochs=2, progress=False)
    before = [parameter.clone() for parameter in given.parameters()]
    model = small(autoencoder=given).fit(x)
    assert model.history_["pretraining"] == []
    assert all(torch.equal(a, b) for a, b in zip(before, given.parameters(), strict=True))
    assert not torch.equal(before[0], next(model.autoencoder_.parameters()))
    with pytest.raises(ValueError, match="autoencoder: expected input_size 7"):
        small(autoencoder=given).fit(x[:, :7])


def test_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    small().fit(points()[0])
    assert torch.equal(torch.rand(1), expected)


def test_half_precision_and_double():
    x, y = points(300)
    model = small(precision="bfloat16", pretrain_epochs=60, max_iter=100, tol=0.001).fit(x)
    assert adjusted_rand_score(y, model.labels_) > 0.9
    assert model.transform(x).dtype == np.float32
    double = small(dtype="float64").fit(x)
    assert double.cluster_centers_.dtype == np.float64


@pytest.mark.parametrize("target", ["stored", "streamed"])
def test_interrupted_after_each_save_ends_with_the_same_bits(tmp_path, monkeypatch, target):
    x, path = points()[0], tmp_path / "c.safetensors"
    whole = small(target=target, pretrain_epochs=2, n_pretrain=2, max_iter=30, clustering_noise=0.1).fit(x)
    save, saved = checkpoint.save, []

    def save_and_stop(name, state):
        save(name, state)
        saved.append(state["stage"])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    for _ in range(100):
        options = {"target": target, "pretrain_epochs": 2, "n_pretrain": 2, "max_iter": 30, "clustering_noise": 0.1}
        part = small(**options, checkpoint=path, checkpoint_interval=0)
        try:
            part.fit(x)
            break
        except KeyboardInterrupt:
            # Each fit saves what it has taken up once more; let it get on.
            fits = iter(range(2))

            def every_second(name, state, fits=fits):
                save(name, state)
                saved.append(state["stage"])
                if next(fits, None) != 0:
                    raise KeyboardInterrupt

            monkeypatch.setattr(checkpoint, "save", every_second)
    assert set(saved) == {"pretraining", "clustering", "done"}
    assert len(saved) > 15
    for got, wanted in zip(results(part), results(whole), strict=True):
        assert np.array_equal(got, wanted)
    assert part.history_ == whole.history_
    assert (part.n_iter_, part.converged_) == (whole.n_iter_, whole.converged_)


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    """SIGKILL at times of chance, until it is through."""
    x, path = points()[0], tmp_path / "c.safetensors"
    whole = small().fit(x)
    command = [sys.executable, Path(__file__).with_name("dec_cases.py"), str(path)]
    rng, kills = random.Random(0), 0
    for _ in range(8):
        before = path.stat().st_mtime_ns if path.exists() else None
        process = subprocess.Popen(command)
        # Killed some saves after it has begun to write.
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
        assert checkpoint.load(path)["kind"] == "DEC"
        if kills == 3:
            break
    assert kills >= 1
    part = small(checkpoint=path, checkpoint_interval=0).fit(x)
    for got, wanted in zip(results(part), results(whole), strict=True):
        assert np.array_equal(got, wanted)
    assert part.history_ == whole.history_


def test_load(tmp_path):
    x, path = points()[0], tmp_path / "c.safetensors"
    model = small(checkpoint=path, alpha=2.0).fit(x)
    loaded = DEC.load(path)
    assert loaded.alpha == 2.0
    for got, wanted in zip(results(loaded), results(model), strict=True):
        assert np.array_equal(got, wanted)
    assert np.array_equal(loaded.predict(x), model.labels_)
    assert loaded.history_ == model.history_
    assert (loaded.n_iter_, loaded.converged_) == (model.n_iter_, model.converged_)
    again = small(checkpoint=path, alpha=2.0).fit(x)  # nothing left to do
    assert np.array_equal(again.labels_, model.labels_)


def test_checkpoint_of_another_fit_is_refused(tmp_path):
    x, path = points()[0], tmp_path / "c.safetensors"
    small(checkpoint=path).fit(x)
    for changes, data, message in (
        ({"alpha": 2.0}, x, "alpha: expected 1.0, as in"),
        ({"hidden_sizes": (4,)}, x, "hidden_sizes: expected"),
        ({"random_state": 1}, x, "random_state: expected 0"),
        ({}, x + 1, "it is of a fit to other data"),
    ):
        with pytest.raises(ValueError, match=message):
            small(checkpoint=path, **changes).fit(data)
    checkpoint.save(path, {"kind": "Autoencoder"})
    with pytest.raises(ValueError, match="expected a checkpoint of DEC, got one of Autoencoder"):
        small(checkpoint=path).fit(x)
    with pytest.raises(ValueError, match="expected the checkpoint of a finished fit of DEC"):
        DEC.load(path)


def test_refusals():
    x = points()[0]
    for changes, message in (
        ({"n_clusters": 0}, "n_clusters: expected at least 1"),
        ({"n_clusters": 151}, "n_clusters: expected at most n_samples=150"),
        ({"alpha": 0.0}, "alpha: expected a number above 0"),
        ({"n_pretrain": 0}, "n_pretrain: expected at least 1"),
        ({"tol": -1}, "tol: expected at least 0"),
        ({"pretrain_optimizer": "rmsprop"}, "pretrain_optimizer: expected one of adam, sgd"),
        ({"corruption": "salt"}, "corruption: expected one of masking, gaussian"),
        ({"clustering_noise": 1.0}, "clustering_noise: expected a number from 0 to below 1"),
        ({"target": "kept"}, "target: expected one of stored, streamed"),
        ({"dtype": "int8"}, "dtype: expected one of float32, float64"),
        ({"learning_rate": 1e30, "precision": "float32"}, r"the loss is .* lower learning_rate"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes).fit(x)
    with pytest.raises(TypeError, match="autoencoder: expected an Autoencoder or None"):
        small(autoencoder=3).fit(x)
