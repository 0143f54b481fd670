"""The variational autoencoder: the code is a Gaussian, and new points can be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastseq._seeds import Noise, generator
from fastseq.autoencoder.base import Autoencoder

LIKELIHOODS = ("bernoulli", "gaussian")


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``KL(N(mean, exp(log_variance)) || N(0, I))`` of each row ``[B]``, exact (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.expm1() - log_variance).sum(1)


class VariationalAutoencoder(Autoencoder):
    """Maximises ``ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z))``, a lower bound of ``log p(x)`` (Kingma & Welling 2014).

    ``q(z|x)`` is a Gaussian with the mean and the variances that the encoder gives, ``p(z) = N(0, I)``; the expectation
    is taken at one draw ``z = mean + std * noise``. The terms of the loss are those of ``-ELBO`` in nats per point:
    ``reconstruction`` (``-log p(x|z)``, with its constants, so that it is a bound) and ``kl`` (exact).

    Args:
        input_size, hidden_sizes, code_size, activation: as for :class:`Autoencoder`.
        likelihood: ``"bernoulli"`` for data in [0, 1] (the decoder gives probabilities), or ``"gaussian"``.
        deviation: the standard deviation of the Gaussian likelihood, in the units of the data.
        beta: the weight of the KL term (Higgins et al. 2017); with 1 the loss is -ELBO.

    Raises:
        ValueError: no such likelihood, or a number out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int] = (500, 500),
        code_size: int = 10,
        *,
        likelihood: str = "bernoulli",
        deviation: float = 1.0,
        beta: float = 1.0,
        activation: str = "relu",
    ) -> None:
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
        output = "sigmoid" if likelihood == "bernoulli" else "linear"
        super().__init__(input_size, hidden_sizes, code_size, activation=activation, output=output)
        if deviation <= 0:
            raise ValueError(f"deviation: expected a number above 0, got {deviation}")
        if beta < 0:
            raise ValueError(f"beta: expected at least 0, got {beta}")
        self.likelihood, self.deviation, self.beta = likelihood, deviation, beta

    def _encoder_outputs(self) -> int:
        return 2 * self.code_size

    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments()
        del arguments["output"]  # follows from the likelihood
        return arguments | {"likelihood": self.likelihood, "deviation": self.deviation, "beta": self.beta}

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of ``q(z|x)``, each ``[B, m]``, differentiable."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def code(self, x: Tensor) -> Tensor:
        """The mean of ``q(z|x)``."""
        return self.posterior(x)[0]

    def terms(self, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        reconstruction, kl = self.bound(x, noise)
        return {"reconstruction": reconstruction.mean(), "kl": self.beta * kl.mean()}

    def bound(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """The two terms of ``-ELBO`` of each point, ``-log p(x|z)`` and the KL divergence, in nats: each ``[B]``."""
        mean, log_variance = self.posterior(x)
        z = mean + (0.5 * log_variance).exp() * noise.normal(mean)
        made = self.decoder(z)
        if self.likelihood == "bernoulli":
            nats = functional.binary_cross_entropy_with_logits(made, x, reduction="none").sum(1)
        else:
            constant = 0.5 * math.log(2 * math.pi * self.deviation**2)
            nats = (0.5 * ((made - x) / self.deviation).square() + constant).sum(1)
        return nats, gaussian_kl(mean, log_variance)

    def elbo(self, x: Any, seed: int = 0) -> float:
        """The mean ELBO of points ``[N, d]``, in nats per point, at one draw of each code."""
        total, count = 0.0, 0
        for index, batch in enumerate(self._batches(x)):
            noise = Noise(generator(seed, index, device=batch.device), 0, len(batch))
            total -= sum(term.double().sum().item() for term in self.bound(batch, noise))
            count += len(batch)
        return total / count

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """New points ``[count, d]``: the decoder's means at codes drawn from ``p(z)``."""
        dtype, device = self._place()
        z = torch.randn(count, self.code_size, generator=generator(seed, device=device), dtype=dtype, device=device)
        return self.decode(z)

    def interpolate(self, first: Tensor, second: Tensor, steps: int = 10) -> Tensor:
        """Points ``[steps, d]`` at the codes on the way from that of ``first [d]`` to that of ``second [d]``.

        The codes are ``(1 - a) z_first + a z_second`` for a from 0 to 1 in equal steps.

        Raises:
            ValueError: fewer than 2 steps.
        """
        if steps < 2:
            raise ValueError(f"steps: expected at least 2, got {steps}")
        ends = self.encode(torch.stack([torch.as_tensor(first), torch.as_tensor(second)]))
        a = torch.linspace(0, 1, steps, dtype=ends.dtype, device=ends.device)[:, None]
        return self.decode((1 - a) * ends[0] + a * ends[1])
