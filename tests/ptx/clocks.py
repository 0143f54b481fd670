"""What is ordered before what, by vector clocks of warps, and the races that they show.

Each warp counts its own releases and knows of every other warp up to which of its counts it has seen. Two accesses are
ordered if the later one's warp has seen the count at which the earlier one was made (Flanagan and Freund, FastTrack,
2009). The lanes of a warp count as one: what they do among themselves is not judged.
"""

from __future__ import annotations

import numpy as np

#: Bytes that are judged as one.
GRAIN = 2


class Clocks:
    """What the warps of a launch know of each other."""

    def __init__(self, warps: int) -> None:
        self.seen = np.zeros((warps, warps), np.int32)
        np.fill_diagonal(self.seen, 1)

    def meet(self, warps: np.ndarray) -> None:
        """A barrier: each of these has seen what any of them had."""
        self.seen[warps] = self.seen[warps].max(axis=0)
        self.seen[warps, warps] += 1

    def release(self, warp: int) -> np.ndarray:
        """What it passes on, and a new count for what it does from now."""
        passed = self.seen[warp].copy()
        self.seen[warp, warp] += 1
        return passed

    def acquire(self, warp: int, passed: np.ndarray) -> None:
        """It has seen this too."""
        np.maximum(self.seen[warp], passed, out=self.seen[warp])


class Accesses:
    """Who last wrote and read each place of a memory, by warps ``first`` to ``first + readers`` or, writing, by any."""

    def __init__(self, size: int, first: int, readers: int) -> None:
        places = -(-size // GRAIN)
        self.first = first
        self.writer = np.full(places, -1, np.int32)
        self.written = np.zeros(places, np.int32)
        self.read = np.zeros((places, readers), np.int32)

    def by_reading(self, places: np.ndarray, warps: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Notes the reads of ``places [n]`` by ``warps [n]``; which of them race with a write. ``seen [n, warps]`` is
        what each knows."""
        writers = self.writer[places]
        index = np.arange(len(places))
        races = (writers >= 0) & (writers != warps) & (seen[index, writers] < self.written[places])
        self.read[places, warps - self.first] = seen[index, warps]
        return races

    def by_writing(self, places: np.ndarray, warps: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Notes the writes; which of them race with a write, and which with a read."""
        writers = self.writer[places]
        index = np.arange(len(places))
        with_write = (writers >= 0) & (writers != warps) & (seen[index, writers] < self.written[places])
        readers = np.arange(self.first, self.first + self.read.shape[1])
        late = self.read[places] > seen[:, readers]
        late &= readers[None, :] != warps[:, None]
        self.writer[places] = warps
        self.written[places] = seen[index, warps]
        return with_write, late.any(axis=1)
