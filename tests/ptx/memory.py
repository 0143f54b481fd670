"""Memory of a launch: the tensors' and the blocks' shared memory, with a check of every access."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.clocks import GRAIN, Accesses, Clocks


class Fault(Exception):
    """What a kernel must not do, and would do on a GPU without a word."""


class Region:
    """Some bytes that begin at an address. ``data`` are the bytes themselves, shared with whom they belong to."""

    def __init__(self, name: str, base: int, data: np.ndarray, first: int, readers: int) -> None:
        self.name, self.base, self.size = name, base, data.nbytes
        self.data = data
        self.accesses = Accesses(self.size, first, readers)
        self.alive = True

    def _rows(self, addresses: np.ndarray, each: int) -> np.ndarray:
        """Offsets ``[n]`` of accesses of ``each`` bytes.

        Raises:
            Fault: one is not aligned, or not within.
        """
        offsets = addresses.astype(np.int64) - self.base
        if (addresses.astype(np.int64) % each).any():
            raise Fault(f"{self.name}: an access of {each} bytes at {addresses[0]:#x} is not aligned")
        if offsets.min() < 0 or offsets.max() + each > self.size:
            raise Fault(f"{self.name}: offsets {offsets.min()} to {offsets.max() + each} of {self.size} bytes")
        if not self.alive:
            raise Fault(f"{self.name}: its block has ended")
        return offsets

    def load(self, addresses: np.ndarray, each: int, warps: np.ndarray, clocks: Clocks | None) -> np.ndarray:
        """``[n, each]`` bytes. ``clocks`` None: the access is synchronising itself, and races with nobody."""
        offsets = self._rows(addresses, each)
        if clocks is not None:
            places, who = _places(offsets, each, warps)
            races = self.accesses.by_reading(places, who, clocks.seen)
            if races.any():
                raise Fault(f"{self.name}: read at {places[races][0] * GRAIN} while another warp may be writing it")
        return self.data[offsets[:, None] + np.arange(each)]

    def was_written(self, addresses: np.ndarray, each: int) -> bool:
        """Whether this launch has stored to any of these places."""
        places, _ = _places(self._rows(addresses, each), each, addresses)
        return bool((self.accesses.writer[places] >= 0).any())

    def store(
        self,
        addresses: np.ndarray,
        values: np.ndarray,
        warps: np.ndarray,
        clocks: Clocks | None,
    ) -> None:
        """``values [n, each]`` bytes; ``clocks`` as in :meth:`load`."""
        each = values.shape[1]
        offsets = self._rows(addresses, each)
        where = offsets[:, None] + np.arange(each)
        if clocks is not None:
            places, who = _places(offsets, each, warps)
            with_write, with_read = self.accesses.by_writing(places, who, clocks.seen)
            if with_read.any():
                raise Fault(f"{self.name}: written at {places[with_read][0] * GRAIN} while another warp may be reading")
            # Warps that hold the same tile may all write the same.
            if with_write.any() and (self.data[where] != values).any():
                raise Fault(f"{self.name}: written at {places[with_write][0] * GRAIN} by two warps at once")
        self.data[where] = values
        if clocks is not None and (self.data[where] != values).any():
            raise Fault(f"{self.name}: written by two threads of one instruction, not the same")


def _places(offsets: np.ndarray, each: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The grains of accesses and the warp of each."""
    grains = max(1, each // GRAIN)
    return (offsets[:, None] // GRAIN + np.arange(grains)).ravel(), np.repeat(warps, grains)


class Memory:
    """Regions apart from each other."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.base)
        self.bases = np.array([region.base for region in self.regions], np.int64)

    def parts(self, addresses: np.ndarray) -> list[tuple[Region, np.ndarray | slice]]:
        """Which region each address is in: regions, with the indices of their addresses.

        Raises:
            Fault: one is before all of them.
        """
        found = np.searchsorted(self.bases, addresses.astype(np.int64), side="right") - 1
        if found.min() < 0:
            raise Fault(f"address {addresses.min():#x} is in no tensor of the launch")
        if (found == found[0]).all():
            return [(self.regions[found[0]], slice(None))]
        return [(self.regions[index], np.flatnonzero(found == index)) for index in np.unique(found)]
