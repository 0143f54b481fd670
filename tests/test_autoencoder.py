"""Autoencoders: each loss against its formula, training that learns, repeats, stops early and goes on with its bits."""

import math

import numpy as np
import pytest
import torch
from torch import distributions, nn

from fastseq import ShapeError, checkpoint
from fastseq._seeds import Noise
from fastseq.autoencoder import (
    Autoencoder,
    DenoisingAutoencoder,
    Plan,
    SparseAutoencoder,
    StackedDenoisingAutoencoder,
    VariationalAutoencoder,
)
from fastseq.autoencoder.sparse import kl_sparsity, l1_sparsity
from fastseq.autoencoder.variational import gaussian_kl

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"input_size": 12, "hidden_sizes": (9,), "code_size": 3}
KINDS = {
    "plain": (Autoencoder, {}),
    "sigmoid": (Autoencoder, {"output": "sigmoid"}),
    "l1": (SparseAutoencoder, {"penalty": "l1"}),
    "kl": (SparseAutoencoder, {"penalty": "kl"}),
    "masking": (DenoisingAutoencoder, {}),
    "gaussian": (DenoisingAutoencoder, {"corruption": "gaussian"}),
    "stacked": (StackedDenoisingAutoencoder, {"layer_epochs": 2}),
    "bernoulli": (VariationalAutoencoder, {}),
    "normal": (VariationalAutoencoder, {"likelihood": "gaussian"}),
}
QUICK = {"epochs": 3, "batch_size": 16, "progress": False}


def make(kind, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model, options = KINDS[kind]
    return model(**SIZES, **options).to(dtype)


def data(count=50, seed=0, dtype=torch.float32):
    """Points near a plane of three dimensions, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    return torch.sigmoid(torch.randn(count, 3, generator=generator, dtype=torch.float64) @ mix).to(dtype)


def terms(model, x, seed=0):
    return model.terms(x, Noise.of(seed, len(x)))


def test_reconstruction_is_the_mean_square():
    model, x = make("plain", dtype=torch.float64), data(dtype=torch.float64)
    hidden = torch.relu(x @ model.encoder[0].weight.T + model.encoder[0].bias)
    z = hidden @ model.encoder[2].weight.T + model.encoder[2].bias
    back = torch.relu(z @ model.decoder[0].weight.T + model.decoder[0].bias)
    made = back @ model.decoder[2].weight.T + model.decoder[2].bias
    torch.testing.assert_close(model.encode(x), z)
    torch.testing.assert_close(model.reconstruct(x), made)
    torch.testing.assert_close(model.decode(z), made)
    torch.testing.assert_close(terms(model, x)["reconstruction"], (made - x).square().mean())


def test_sparsity():
    z = torch.rand(7, 4, dtype=torch.float64)
    expected = sum(abs(number) for row in z.tolist() for number in row) / 7
    assert l1_sparsity(z).item() == pytest.approx(expected)
    target = torch.full((4,), 0.05, dtype=torch.float64)
    divergence = distributions.kl_divergence(distributions.Bernoulli(target), distributions.Bernoulli(z.mean(0)))
    assert kl_sparsity(z, 0.05).item() == pytest.approx(divergence.sum().item())
    assert kl_sparsity(torch.full((2, 3), 0.05, dtype=torch.float64), 0.05).item() == pytest.approx(0, abs=1e-15)
    assert math.isfinite(kl_sparsity(torch.zeros(2, 3), 0.05).item())  # dead units
    for kind, omega in (("l1", l1_sparsity), ("kl", lambda z: kl_sparsity(z, 0.05))):
        model, x = make(kind, dtype=torch.float64), data(dtype=torch.float64)
        torch.testing.assert_close(terms(model, x)["sparsity"], 1e-3 * omega(model.code(x)))
    assert ((make("kl").encode(data()) > 0) & (make("kl").encode(data()) < 1)).all()


def test_corruptions():
    x = torch.ones(400, 50)
    masking = DenoisingAutoencoder(50, level=0.3).corrupt(x, Noise.of(0, 400))
    assert set(masking.unique().tolist()) == {0.0, 1.0}
    share = (masking == 0).double().mean().item()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / x.numel())
    gaussian = DenoisingAutoencoder(50, corruption="gaussian", level=0.3).corrupt(x, Noise.of(0, 400)) - x
    assert abs(gaussian.std().item() - 0.3) < 5 * 0.3 / math.sqrt(2 * x.numel())
    assert abs(gaussian.mean().item()) < 5 * 0.3 / math.sqrt(x.numel())
    assert torch.equal(DenoisingAutoencoder(50, level=0).corrupt(x, Noise.of(0, 400)), x)


def test_noise_of_a_part_is_part_of_the_noise():
    x = torch.ones(10, 4)
    whole = Noise.of(5, 10).normal(x)
    part = Noise.of(5, 10)
    part.start = 6
    assert torch.equal(part.normal(x[6:9]), whole[6:9])


def test_divergence_of_gaussians_is_exact():
    mean, log_variance = torch.randn(2, 6, 3, dtype=torch.float64)
    got = gaussian_kl(mean, log_variance)
    q = distributions.Normal(mean, (0.5 * log_variance).exp())
    torch.testing.assert_close(got, distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum(1))
    assert gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["bernoulli", "normal"])
def test_bound_has_the_terms_of_the_likelihood(kind):
    model, x = make(kind, dtype=torch.float64), data(dtype=torch.float64)
    if kind == "bernoulli":
        x = x.round()
    else:
        model.deviation = 0.7
    mean, log_variance = model.posterior(x)
    z = mean + (0.5 * log_variance).exp() * Noise.of(3, len(x)).normal(mean)
    made = model.decode(z)
    likelihood = distributions.Bernoulli(made) if kind == "bernoulli" else distributions.Normal(made, 0.7)
    nats, divergence = model.bound(x, Noise.of(3, len(x)))
    torch.testing.assert_close(nats, -likelihood.log_prob(x).sum(1))
    got = terms(model, x, seed=3)
    torch.testing.assert_close(got["reconstruction"] + got["kl"], (nats + divergence).mean())
    assert model.elbo(x) < 0


def test_elbo_bounds_the_likelihood():
    """With a linear Gaussian decoder ``log p(x)`` is known."""
    torch.manual_seed(0)
    model = VariationalAutoencoder(5, (), 2, likelihood="gaussian", deviation=0.8).double()
    x = torch.randn(64, 5, dtype=torch.float64)
    weight, bias = model.decoder[0].weight.detach(), model.decoder[0].bias.detach()
    covariance = weight @ weight.T + 0.64 * torch.eye(5, dtype=torch.float64)
    evidence = distributions.MultivariateNormal(bias, covariance).log_prob(x).mean().item()
    draws = [model.elbo(x, seed=seed) for seed in range(20)]
    assert np.mean(draws) + 3 * np.std(draws) < evidence
    model.fit(x, epochs=300, learning_rate=0.02, batch_size=64, progress=False)
    weight, bias = model.decoder[0].weight.detach(), model.decoder[0].bias.detach()
    covariance = weight @ weight.T + 0.64 * torch.eye(5, dtype=torch.float64)
    evidence = distributions.MultivariateNormal(bias, covariance).log_prob(x).mean().item()
    draws = [model.elbo(x, seed=seed) for seed in range(20)]
    assert np.mean(draws) < evidence + 3 * np.std(draws) / math.sqrt(20)


def test_sample_and_interpolate():
    model, x = make("bernoulli"), data()
    sample = model.sample(9, seed=1)
    assert sample.shape == (9, 12)
    assert ((sample > 0) & (sample < 1)).all()
    assert torch.equal(sample, model.sample(9, seed=1))
    assert not torch.equal(sample, model.sample(9, seed=2))
    strip = model.interpolate(x[0], x[1], steps=5)
    ends = model.encode(x[:2])
    torch.testing.assert_close(strip[[0, 4]], model.decode(ends))
    torch.testing.assert_close(strip[1], model.decode((0.75 * ends[0] + 0.25 * ends[1])[None])[0])
    with pytest.raises(ValueError, match="steps: expected at least 2"):
        model.interpolate(x[0], x[1], steps=1)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_learns_and_repeats(kind):
    x = data(200)
    first = make(kind)
    history = first.fit(x, epochs=25, batch_size=32, learning_rate=5e-3, progress=False)
    last = [entry for entry in history if entry.get("stage", 1) == 1]
    assert last[-1]["loss"] < (0.99 if kind in ("bernoulli", "normal", "kl") else 0.8) * history[0]["loss"]
    assert last[-1]["loss"] == pytest.approx(
        sum(v for k, v in last[-1].items() if k in ("reconstruction", "sparsity", "kl"))
    )
    second = make(kind)
    torch.manual_seed(99)  # the global generator plays no part
    assert second.fit(x, epochs=25, batch_size=32, learning_rate=5e-3, progress=False) == history
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = make(kind)
    assert other.fit(x, seed=1, **QUICK) != make(kind).fit(x, seed=0, **QUICK)


@pytest.mark.parametrize("kind", ["sigmoid", "masking", "stacked", "normal"])
def test_goes_on_with_the_same_bits(kind, tmp_path, monkeypatch):
    """Interrupted after each save in turn, and taken up again."""
    x, path = data(40), tmp_path / "c.safetensors"
    whole = make(kind)
    history = whole.fit(x, patience=2, **QUICK)
    save, left = checkpoint.save, [0]

    def save_and_stop(*args):
        save(*args)
        left[0] += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    for _ in range(100):
        part = make(kind, seed=left[0])  # what it starts from does not matter once there is a checkpoint
        if left[0] == 0:
            part = make(kind)
        try:
            got = part.fit(x, patience=2, checkpoint=path, checkpoint_interval=0, **QUICK)
            break
        except KeyboardInterrupt:
            continue
        finally:
            if left[0] > 12:
                monkeypatch.setattr(checkpoint, "save", save)
    assert left[0] > 5
    assert got == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_checkpoint_of_another_training_is_refused(tmp_path):
    x, path = data(), tmp_path / "c"
    make("plain").fit(x, checkpoint=path, **QUICK)
    for model, points, changes, message in (
        (make("masking"), x, {}, "its kind is 'Autoencoder'"),
        (make("plain"), data(seed=1), {}, "its data is"),
        (make("sigmoid"), x, {}, "its arguments is"),
        (make("plain"), x, {"seed": 3}, "seed: expected 0, as in the checkpoint, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(points, checkpoint=path, **QUICK | changes)
    longer = make("plain")
    assert len(longer.fit(x, checkpoint=path, **QUICK | {"epochs": 5})) == 5
    straight = make("plain")
    straight.fit(x, **QUICK | {"epochs": 5})
    assert all(torch.equal(a, b) for a, b in zip(longer.parameters(), straight.parameters(), strict=True))


def test_early_stop_takes_the_best():
    x = data(30)
    model = make("plain")
    history = model.fit(x, epochs=400, patience=3, validation=data(30, seed=1), learning_rate=0.05, progress=False)
    losses = [entry["validation"] for entry in history]
    assert len(history) < 400
    assert losses.index(min(losses)) == len(losses) - 4
    got = (model.reconstruct(data(30, seed=1)) - data(30, seed=1)).square().mean().item()
    assert got == pytest.approx(min(losses), rel=1e-5)


def test_learning_rate_falls():
    model, x = make("plain"), data()
    plan = Plan(epochs=5, optimizer="sgd", learning_rate=0.1, decay_epochs=2, batch_size=50)
    from fastseq.autoencoder.points import Points
    from fastseq.autoencoder.training import Training

    training = Training(model.terms, (model,), Points(x), plan, None)
    rates = []
    for _ in range(5):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.step(training.order())
        training.end_epoch()
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


class Rows(torch.utils.data.Dataset):
    def __init__(self, x, labelled):
        self.x, self.labelled = x, labelled

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return (self.x[index], 0) if self.labelled else self.x[index]


def test_every_holder_of_points_gives_the_same(tmp_path):
    x = data()
    np.save(tmp_path / "x.npy", x.numpy())
    held = [x, x.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r"), Rows(x, True), Rows(x, False)]
    held.append(torch.utils.data.TensorDataset(x))
    held.append(x.numpy()[::-1].copy()[::-1])
    results = []
    for points in held:
        model = make("masking")
        results.append((model.fit(points, **QUICK), model.encode(points)))
    for history, codes in results[1:]:
        assert history == results[0][0]
        assert torch.equal(codes, results[0][1])


def test_stacked_trains_layer_by_layer():
    torch.manual_seed(0)
    model = StackedDenoisingAutoencoder(12, (9, 7), 3, layer_epochs=4, init="paper")
    assert all(layer.bias.eq(0).all() for layer in model.modules() if isinstance(layer, nn.Linear))
    pairs = model.pairs()
    assert [(up[0].in_features, up[0].out_features) for _, up, _ in pairs] == [(12, 9), (9, 7), (7, 3)]
    assert [(down[0].in_features, down[0].out_features) for _, _, down in pairs] == [(9, 12), (7, 9), (3, 7)]
    assert [len(up) for _, up, _ in pairs] == [2, 2, 1]  # the code is linear
    assert [len(down) for _, _, down in pairs] == [1, 2, 2]  # and the data
    below, up, down = pairs[1]
    x = data()
    model.dropout = 0.0
    hidden = torch.relu(model.encoder[0](x))
    expected = (torch.relu(model.decoder[2](torch.relu(model.encoder[2](hidden)))) - hidden).square().mean()
    torch.testing.assert_close(model.layer_terms(below, up, down)(x, Noise.of(0, 50))["reconstruction"], expected)
    model.dropout = 0.2
    history = model.fit(x, **QUICK)
    assert [entry["stage"] for entry in history] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3


def test_bfloat16_learns_the_same():
    x = data(200)
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = make("masking")
        losses[precision] = model.fit(x, epochs=20, precision=precision, batch_size=32, progress=False)[-1]["loss"]
        assert model.encode(x).dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


def test_refusals():
    model = make("plain")
    for call, error, message in (
        (lambda: Autoencoder(0), ValueError, "input_size: expected at least 1"),
        (lambda: Autoencoder(3, (4, 0)), ValueError, "hidden_sizes: expected at least 1"),
        (lambda: Autoencoder(3, activation="step"), ValueError, "activation: expected one of relu"),
        (lambda: Autoencoder(3, output="relu"), ValueError, "output: expected one of linear, sigmoid"),
        (lambda: DenoisingAutoencoder(3, level=1.0), ValueError, "level: expected a number from 0 to below 1"),
        (lambda: DenoisingAutoencoder(3, corruption="salt"), ValueError, "corruption: expected one of"),
        (lambda: SparseAutoencoder(3, penalty="l2"), ValueError, "penalty: expected one of l1, kl"),
        (lambda: SparseAutoencoder(3, weight=-1), ValueError, "weight: expected at least 0"),
        (lambda: SparseAutoencoder(3, target=0), ValueError, "target: expected a number between 0 and 1"),
        (lambda: VariationalAutoencoder(3, likelihood="t"), ValueError, "likelihood: expected one of"),
        (lambda: VariationalAutoencoder(3, deviation=0), ValueError, "deviation: expected a number above 0"),
        (lambda: StackedDenoisingAutoencoder(3, dropout=1), ValueError, "dropout: expected a number"),
        (lambda: StackedDenoisingAutoencoder(3, init="zero"), ValueError, "init: expected 'torch' or 'paper'"),
        (lambda: model.fit(data(), epochs=-1), ValueError, "epochs: expected at least 0"),
        (lambda: model.fit(data(), learning_rate=0), ValueError, "learning_rate: expected a number above 0"),
        (lambda: model.fit(data(), optimizer="lion"), ValueError, "optimizer: expected one of adam, sgd"),
        (lambda: model.fit(data(), precision="fp8"), ValueError, "precision: expected one of"),
        (lambda: model.fit(torch.ones(3, 4)), ShapeError, "data: expected 12 features, got 4"),
        (lambda: model.fit(torch.ones(3)), ShapeError, r"data: expected shape \[N, d\]"),
        (lambda: model.fit(torch.ones(0, 12)), ShapeError, r"data: expected shape \[N, d\]"),
        (lambda: model.fit([[1.0] * 12]), TypeError, "data: expected an array, a tensor or a torch Dataset"),
        (lambda: model.fit(torch.ones(3, 12, dtype=torch.complex64)), TypeError, "data: expected real numbers"),
        (lambda: model.decode(torch.ones(3, 4)), ShapeError, r"z: expected shape \[N, 3\]"),
        (lambda: model.fit(data() * math.nan, **QUICK), ValueError, "the loss is nan after epoch 1"),
    ):
        with pytest.raises(error, match=message):
            call()
