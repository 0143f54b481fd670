"""Random numbers that hang on a seed and a place (epoch 3, step 1200), not on what was drawn before.

So a training that goes on from a checkpoint draws what it would have drawn, with no generator's state to keep, and
each of several processes can draw the whole batch's noise and take its own rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(*place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a hash of ``place``, which begins with the seed."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class Noise:
    """Noise for the rows ``start`` … of a batch of ``count`` rows, drawn for all of them."""

    generator: torch.Generator
    start: int
    count: int

    @classmethod
    def of(cls, seed: int, rows: int, device: torch.device | str = "cpu") -> Noise:
        """Noise for a whole batch of ``rows``."""
        return cls(generator(seed, device=device), 0, rows)

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1), in the shape, dtype and place of ``like``, whose first dimension is the rows."""
        return self._rows(torch.rand, like)

    def normal(self, like: Tensor) -> Tensor:
        """Numbers from N(0, 1), likewise."""
        return self._rows(torch.randn, like)

    def _rows(self, draw: object, like: Tensor) -> Tensor:
        assert callable(draw)
        shape = (self.count, *like.shape[1:])
        whole: Tensor = draw(shape, generator=self.generator, dtype=like.dtype, device=like.device)
        return whole[self.start : self.start + like.shape[0]]
