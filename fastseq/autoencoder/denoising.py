"""The denoising autoencoder: its input is corrupted, and it is trained to give the whole input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastseq._seeds import Noise
from fastseq.autoencoder.base import Autoencoder

CORRUPTIONS = ("masking", "gaussian")


def masked(x: Tensor, level: float, noise: Noise) -> Tensor:
    """``x`` with a share ``level`` of its numbers, chosen at random, set to zero."""
    return x * (noise.uniform(x) >= level)


def corrupted(x: Tensor, corruption: str, level: float, noise: Noise) -> Tensor:
    """``x [B, d]`` with a share ``level`` of its numbers masked, or with N(0, level²) added; level 0: ``x`` itself."""
    if level == 0:
        return x
    return masked(x, level, noise) if corruption == "masking" else x + level * noise.normal(x)


def check_corruption(corruption: str, level: float, name: str = "level") -> None:
    """Refuses what :func:`corrupted` cannot do, with ValueError."""
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got {corruption!r}")
    if not level >= 0 or (corruption == "masking" and level >= 1):
        wanted = "from 0 to below 1" if corruption == "masking" else "of at least 0"
        raise ValueError(f"{name}: expected a number {wanted}, got {level}")


class DenoisingAutoencoder(Autoencoder):
    """Minimises ``L(x, g(f(x + noise)))`` (Vincent et al. 2008).

    Args:
        input_size, hidden_sizes, code_size, activation, output: as for :class:`Autoencoder`.
        corruption: ``"masking"``: numbers are set to zero; ``"gaussian"``: noise of N(0, level²) is added.
        level: the share that is set to zero, or the standard deviation in the units of the data.

    Raises:
        ValueError: no such corruption, or a level out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int] = (500, 500, 2000),
        code_size: int = 10,
        *,
        corruption: str = "masking",
        level: float = 0.2,
        activation: str = "relu",
        output: str = "linear",
    ) -> None:
        super().__init__(input_size, hidden_sizes, code_size, activation=activation, output=output)
        check_corruption(corruption, level)
        self.corruption, self.level = corruption, level

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"corruption": self.corruption, "level": self.level}

    def corrupt(self, x: Tensor, noise: Noise) -> Tensor:
        return corrupted(x, self.corruption, self.level, noise)
