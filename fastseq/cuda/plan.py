"""Which regime and which build of the CUDA kernels serve a shape on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fastseq.cpu.memory import STORAGE
from fastseq.cuda.extension import extension

REGIMES = ("cluster", "grid", "cell")
HALF_TYPES = (torch.float16, torch.bfloat16)
H100_SHARED = 227 * 1024  # bytes that a block may have
H100_PROCESSORS = 132
LARGEST_TOLD = 4096  # hidden size


@dataclass(frozen=True)
class Plan:
    """How a layer is computed. In the regime ``cluster``: ``build`` of the kernel, ``blocks`` of a cluster, ``rows`` of
    a tile of the batch, and how many ``clusters`` share the ``tiles``; in ``grid``: as its build the groups of 8 units
    of a block, and ``blocks`` of the grid; ``cell`` has none of it."""

    regime: str
    build: int = -1
    blocks: int = 0
    rows: int = 0
    tiles: int = 0
    clusters: int = 0

    def __str__(self) -> str:
        if self.regime == "cell":
            return "cell, a product and a fused kernel for each step"
        if self.regime == "grid":
            return f"grid, {self.blocks} blocks of {8 * self.build} units"
        return f"cluster, {self.clusters} clusters of {self.blocks} blocks, {self.tiles} tiles of {self.rows} sequences"


_overrides: dict[str, Any] = {}


@contextlib.contextmanager
def override(*, regime: str | None = None, build: int | None = None) -> Iterator[None]:
    """Inside the ``with`` block plans have this regime or build, or raise. For tests and for measuring."""
    global _overrides
    given = {name: value for name, value in (("regime", regime), ("build", build)) if value is not None}
    before, _overrides = _overrides, _overrides | given
    try:
        yield
    finally:
        _overrides = before


def choose(
    steps: int, batch: int, hidden: int, dtype: torch.dtype, device: torch.device, backward: bool, flags: bool
) -> Plan:
    """The plan of an LSTM's pass: a cluster where one fits the device, else the grid where it does, else cells.

    Raises:
        RuntimeError: an override asks for what does not fit; the message says why.
    """
    regime = _overrides.get("regime")
    if regime == "cell" or (regime is None and steps == 1):
        return Plan("cell")
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
    for name, find in (("cluster", _cluster), ("grid", _grid)):
        if regime not in (None, name):
            continue
        found, reason = find(batch, hidden, dtype, index, backward, flags, _overrides.get("build"))
        if found is not None:
            return found
        if regime == name:
            raise RuntimeError(f"the {name} kernel was asked for, but cannot serve: {reason}")
    return Plan("cell")


@cache
def regimes(backward: bool) -> str:
    """Which regime serves which hidden sizes of an LSTM in half types on this GPU, else on an H100."""
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    def serves(regime: str, hidden: int) -> bool:
        if here is not None:
            find = _cluster if regime == "cluster" else _grid
            return find(1, hidden, torch.float16, here.index, backward, True, None)[0] is not None
        if regime == "cluster":
            return any(shared <= H100_SHARED for *_, shared in extension().cluster_builds(hidden, backward))
        builds = extension().grid_builds(1, hidden, backward)
        return any(blocks <= H100_PROCESSORS and shared <= H100_SHARED for _, blocks, shared in builds)

    told, before = [], 0
    for regime in ("cluster", "grid"):
        largest = next((hidden for hidden in range(LARGEST_TOLD, before, -1) if serves(regime, hidden)), 0)
        if largest:
            told.append(f"{regime} to {largest}")
            before = largest
    return ", ".join([*told, "cell beyond" if told else "cell"])


@cache
def _cluster(
    batch: int, hidden: int, dtype: torch.dtype, device: int, backward: bool, flags: bool, build: int | None
) -> tuple[Plan | None, str]:
    """The best cluster plan, or None and why there is none."""
    if dtype not in HALF_TYPES:
        return None, f"it serves float16 and bfloat16, not {dtype}"
    major, _, _, shared_limit = extension().device_facts(device)
    if major < 9:
        return None, "the device has no thread-block clusters (compute capability 9.0 and newer have them)"
    best: tuple[tuple[int, ...], Plan] | None = None
    for of, blocks, _, rows, shared in extension().cluster_builds(hidden, backward):
        if shared > shared_limit or build not in (None, of):
            continue
        resident = extension().resident_clusters(STORAGE[dtype], backward, flags, of, hidden)
        if resident < 1:
            continue
        tiles = -(-batch // rows)
        clusters = min(tiles, resident)
        # Few rounds of the whole sequence first, then narrow products, then little of the weights for a block.
        cost = (-(-tiles // clusters), rows, -blocks)
        if best is None or cost < best[0]:
            best = cost, Plan("cluster", of, blocks, rows, tiles, clusters)
    if best is None:
        return None, f"no build holds the recurrent weights of {hidden} units in a cluster of this device"
    return best[1], ""


@cache
def _grid(
    batch: int, hidden: int, dtype: torch.dtype, device: int, backward: bool, flags: bool, build: int | None
) -> tuple[Plan | None, str]:
    """The plan of the grid-wide kernel, or None and why there is none."""
    if dtype not in HALF_TYPES:
        return None, f"it serves float16 and bfloat16, not {dtype}"
    shared_limit = extension().device_facts(device)[3]
    for groups, blocks, shared in extension().grid_builds(batch, hidden, backward):
        if shared > shared_limit or build not in (None, groups):
            continue
        # The smallest blocks that are all there at once: they have the least to multiply.
        if blocks <= extension().resident_blocks(STORAGE[dtype], backward, flags, groups, batch, hidden):
            return Plan("grid", groups, blocks), ""
    return None, f"the device does not hold the recurrent weights of {hidden} units and {batch} sequences at once"
