"""What is ordered before what, by vector clocks of warps, and the races that they show.

Each warp counts its own releases and knows of every other warp up to which of its counts it has seen. Two accesses are
ordered if the later one's warp has seen the count at which the earlier one was made (Flanagan and Freund, FastTrack,
2009). The lanes of a warp count as one: what they do among themselves is not judged.
"""

from __future__ import annotations

import numpy as np

#: Bytes that are judged as one.
GRAIN = 2


def merged(known: np.ndarray | None, passed: np.ndarray) -> np.ndarray:
    """What who knew this, or nothing, knows when that is passed on."""
    return passed if known is None else np.maximum(known, passed)


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


#: In the place of a reader: nobody, and several, of which each has its own count in a row.
_NOBODY, _SEVERAL = -1, -2


class Accesses:
    """Who last wrote each place of a memory, and who has read it since: one of the warps ``first`` to ``first +
    readers``, or several of them, which few places have."""

    def __init__(self, size: int, first: int, readers: int) -> None:
        places = -(-size // GRAIN)
        self.first, self.readers = first, np.arange(first, first + readers)
        self.writer = np.full(places, _NOBODY, np.int32)
        self.written = np.zeros(places, np.int32)
        self.reader = np.full(places, _NOBODY, np.int32)
        self.read = np.zeros(places, np.int32)
        self.row = np.full(places, -1, np.int32)
        self.rows = np.zeros((0, readers), np.int32)
        self.used = 0

    def by_reading(self, places: np.ndarray, warps: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Notes the reads of ``places [n]`` by ``warps [n]``; which of them race with a write. ``seen`` is what the
        warps know."""
        races = self._race_with_write(places, warps, seen)
        counts = seen[warps, warps]
        before = self.reader[places]
        one = before != _SEVERAL
        self.reader[places[one]] = warps[one]
        others = one & ((self.reader[places] != warps) | ((before != _NOBODY) & (before != warps)))
        if others.any():
            self._share(places[others], before[others])
        several = self.reader[places] == _SEVERAL
        self.rows[self.row[places[several]], warps[several] - self.first] = counts[several]
        self.read[places[~several]] = counts[~several]
        return races

    def by_writing(self, places: np.ndarray, warps: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Notes the writes; which of them race with a write, and which with a read. Who is ordered after a write is
        ordered after the reads before it, so these are forgotten."""
        with_write = self._race_with_write(places, warps, seen)
        reader = self.reader[places]
        with_read = (reader >= 0) & (reader != warps) & (seen[warps, reader] < self.read[places])
        several = np.flatnonzero(reader == _SEVERAL)
        if len(several):
            late = self.rows[self.row[places[several]]] > seen[np.ix_(warps[several], self.readers)]
            with_read[several] = (late & (self.readers != warps[several, None])).any(axis=1)
        self.reader[places] = _NOBODY
        self.writer[places] = warps
        self.written[places] = seen[warps, warps]
        return with_write, with_read

    def _race_with_write(self, places: np.ndarray, warps: np.ndarray, seen: np.ndarray) -> np.ndarray:
        writers = self.writer[places]
        return np.asarray((writers >= 0) & (writers != warps) & (seen[warps, writers] < self.written[places]))

    def _share(self, places: np.ndarray, before: np.ndarray) -> None:
        """Gives each of these places a row, with the one that read it before."""
        places, index = np.unique(places, return_index=True)
        before = before[index]
        fresh = places[self.row[places] < 0]
        if self.used + len(fresh) > len(self.rows):
            more = max(len(self.rows), len(fresh), 64)
            self.rows = np.concatenate([self.rows, np.zeros((more, len(self.readers)), np.int32)])
        self.row[fresh] = np.arange(self.used, self.used + len(fresh))
        self.used += len(fresh)
        self.rows[self.row[places]] = 0
        known = before >= 0
        self.rows[self.row[places[known]], before[known] - self.first] = self.read[places[known]]
        self.reader[places] = _SEVERAL
