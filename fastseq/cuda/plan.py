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

REGIMES = ("cluster", "cell")
HALF_TYPES = (torch.float16, torch.bfloat16)
H100_SHARED = 227 * 1024  # bytes that a block may have
LARGEST_TOLD = 1024  # hidden size


@dataclass(frozen=True)
class Plan:
    """How a layer is computed. In the regime ``cluster``: ``build`` of the kernel, ``blocks`` of a cluster, ``rows`` of
    a tile of the batch, and how many ``clusters`` share the ``tiles``; ``cell`` has none of it."""

    regime: str
    build: int = -1
    blocks: int = 0
    rows: int = 0
    tiles: int = 0
    clusters: int = 0

    def __str__(self) -> str:
        if self.regime == "cell":
            return "cell, a product and a fused kernel for each step"
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
    """The plan of an LSTM's pass: a cluster where one fits the device, else cells.

    Raises:
        RuntimeError: an override asks for what does not fit; the message says why.
    """
    regime = _overrides.get("regime")
    if regime == "cell" or (regime is None and steps == 1):
        return Plan("cell")
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
    found, reason = _cluster(batch, hidden, dtype, index, backward, flags, _overrides.get("build"))
    if found is not None:
        return found
    if regime == "cluster":
        raise RuntimeError(f"the cluster kernel was asked for, but cannot serve: {reason}")
    return Plan("cell")


@cache
def regimes(backward: bool) -> str:
    """Which regime serves which hidden sizes of an LSTM in half types on this GPU, else on an H100."""
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    def by_cluster(hidden: int) -> bool:
        if here is not None:
            return choose(2, 1, hidden, torch.float16, here, backward, True).regime == "cluster"
        return any(shared <= H100_SHARED for *_, shared in extension().cluster_builds(hidden, backward))

    largest = next((hidden for hidden in range(LARGEST_TOLD, 0, -1) if by_cluster(hidden)), 0)
    return f"cluster to {largest}, cell beyond" if largest else "cell"


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
