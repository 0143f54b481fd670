"""The sparse autoencoder: few numbers of a code are large at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq._seeds import Noise
from fastseq.autoencoder.base import Autoencoder
from fastseq.autoencoder.ranks import Ranks

PENALTIES = ("l1", "kl")


def l1_sparsity(z: Tensor) -> Tensor:
    """``sum_j |z_ij|``, the mean over i."""
    return z.abs().sum(1).mean()


def kl_sparsity(z: Tensor, target: float) -> Tensor:
    """``sum_j KL(target || r_j)`` of Bernoulli distributions, with ``r_j`` the mean over i of codes in (0, 1).

    ``target log(target / r_j) + (1 - target) log((1 - target) / (1 - r_j))`` (Ng 2011, CS294A notes, section 3).
    """
    mean = z.mean(0)
    tiny = torch.finfo(mean.dtype).eps
    mean = mean.clamp(tiny, 1 - tiny)
    return (
        torch.xlogy(mean.new_tensor(target), target / mean) + (1 - target) * ((1 - target) / (1 - mean)).log()
    ).sum()


class SparseAutoencoder(Autoencoder):
    """Minimises ``L(x, g(f(x))) + weight * Omega(f(x))``.

    Args:
        input_size, hidden_sizes, code_size, activation, output: as for :class:`Autoencoder`.
        penalty: ``"l1"``: :func:`l1_sparsity` of the code, which is linear; ``"kl"``: :func:`kl_sparsity` of the code,
            which then goes through the logistic function.
        weight: of the penalty.
        target: the mean activation that ``"kl"`` asks for.

    Raises:
        ValueError: no such penalty, or a number out of range; ``"kl"`` trained by several processes, each of which
            would see the mean of its own part of the batch only.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int] = (),
        code_size: int = 64,
        *,
        penalty: str = "l1",
        weight: float = 1e-3,
        target: float = 0.05,
        activation: str = "relu",
        output: str = "linear",
    ) -> None:
        super().__init__(input_size, hidden_sizes, code_size, activation=activation, output=output)
        if penalty not in PENALTIES:
            raise ValueError(f"penalty: expected one of {', '.join(PENALTIES)}, got {penalty!r}")
        if weight < 0:
            raise ValueError(f"weight: expected at least 0, got {weight}")
        if not 0 < target < 1:
            raise ValueError(f"target: expected a number between 0 and 1, got {target}")
        self.penalty, self.weight, self.target = penalty, weight, target

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"penalty": self.penalty, "weight": self.weight, "target": self.target}

    def code(self, x: Tensor) -> Tensor:
        z = super().code(x)
        return torch.sigmoid(z) if self.penalty == "kl" else z

    def terms(self, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        if self.penalty == "kl" and Ranks.found().count > 1:
            raise ValueError("penalty: 'kl' is not for several processes, which would each take a mean of their own")
        z = self.code(x)
        omega = l1_sparsity(z) if self.penalty == "l1" else kl_sparsity(z, self.target)
        return {"reconstruction": (self.decoded(z) - x).square().mean(), "sparsity": self.weight * omega}
