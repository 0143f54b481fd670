"""Which regime and which tile sizes serve a shape. Plain arithmetic: nothing here imports triton or needs a GPU.

- ``resident``: the recurrent weights fit one SM. One program per tile of the batch walks through the whole sequence
  with the weights and h on chip, and waits for nobody.
- ``persistent``: the weights are spread over the SMs, each program holding the columns of its units in shared memory;
  where they do not fit there it reads them from the L2 cache at every step. The programs of one tile of the batch form
  a group, which exchanges h through the L2 cache and waits for each other once per step. The launch is cooperative: all
  programs run at once, or it fails.
- ``step``: one launch per step, for a single step and for what does not fit a cooperative launch.

A group that has several tiles of the batch to do takes one after the other, so any batch size fits.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHOICES = {"regime", "BB", "BH", "groups", "warps", "stages", "hold", "KC", "depth", "sync", "precision"}
REGIMES = ("resident", "persistent", "step")
SYNCS = ("counter", "flags")
PRECISIONS = ("ieee", "tf32", "tf32x3")

# Shared memory of a program beside its weights: h on its way, and what the sum over the warps needs.
EXCHANGE_BYTES = 56 * 1024
# Sums [BB, columns] that a program's warps keep in registers; twice that spills.
ACCUMULATORS = 1024
# Without tensor cores, and with an operand made of two, the weights take many registers on their way to the product.
HELD_BYTES_FLOAT32 = {"ieee": 24 * 1024, "tf32": 128 * 1024, "tf32x3": 24 * 1024}
RESIDENT_BYTES = {2: 128 * 1024, 4: 16 * 1024}  # by the bytes of a number
# Hidden sizes beyond this one are not told apart.
LARGEST_TOLD = 1 << 13
BATCH_TILES = (16, 32)
UNIT_TILES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Chip:
    """What a plan has to know of a GPU: how many programs run at once, one on each multiprocessor, and the shared
    memory that one may have, in bytes."""

    programs: int
    shared: int


H100 = Chip(132, 227 * 1024)


@dataclass(frozen=True)
class Plan:
    """How one launch computes. ``BB`` and ``BH`` are tiles of the batch and of the units, ``groups`` and ``programs``
    the grid (``programs`` in each group), ``warps`` those of a program; ``hold`` keeps the weights on chip. A warp
    takes ``KC`` of the K dimension at a time, ``full`` times, and then ``last``; ``depth`` of these loads run ahead."""

    regime: str
    BB: int
    BH: int
    programs: int
    groups: int
    warps: int
    stages: int
    hold: bool
    KC: int
    full: int
    last: int
    depth: int
    sync: str
    precision: str

    @property
    def grid(self) -> tuple[int, int]:
        """Programs along each axis: those of a group, and the groups."""
        return (self.groups, 1) if self.regime == "resident" else (self.programs, self.groups)

    @property
    def cooperative(self) -> bool:
        """Whether the programs wait for each other, so that all must run at once."""
        return self.regime == "persistent"

    def __str__(self) -> str:
        if self.regime == "resident":
            return f"resident, {self.groups} programs of {self.BB} sequences"
        kept = "held" if self.hold else "streamed"
        return (
            f"{self.regime}, {self.groups} groups of {self.programs} programs, "
            f"tiles of {self.BB} sequences by {self.BH} units, weights {kept}"
        )


@dataclass(frozen=True)
class Shape:
    """What a plan is made for: ``gates`` is 4 for the LSTM and 1 for an Elman layer, ``backward`` which pass."""

    gates: int
    backward: bool
    T: int
    B: int
    H: int
    item: int  # bytes of a number: 2 or 4

    @property
    def K(self) -> int:
        """The length of the recurrent product: h forwards, the gradients of all gates backwards."""
        return self.gates * self.H if self.backward else self.H

    def columns(self, BH: int) -> int:
        """How many columns of weights BH units have."""
        return BH if self.backward else self.gates * BH


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


_overrides: dict[str, Any] = {}


@contextlib.contextmanager
def override(**fields: Any) -> Iterator[None]:
    """Inside the ``with`` block plans take these fields, of :data:`CHOICES`, as given. For tests and for measuring."""
    unknown = fields.keys() - {
        "regime",
        "BB",
        "BH",
        "groups",
        "warps",
        "stages",
        "hold",
        "KC",
        "depth",
        "sync",
        "precision",
    }
    if unknown:
        raise ValueError(f"override: a plan has no field to choose named {', '.join(sorted(unknown))}")
    global _overrides
    before, _overrides = _overrides, _overrides | fields
    try:
        yield
    finally:
        _overrides = before


def choose(shape: Shape, chip: Chip, precision: str = "ieee", cooperative: bool = True) -> Plan:
    """The plan for a shape on a GPU.

    Args:
        shape: what is to be computed.
        chip: the GPU.
        precision: of float32 products: "ieee", "tf32" or "tf32x3" (three tf32 products for one).
        cooperative: whether a launch can ask that all its programs run at once.
    """
    given = _overrides
    precision = given.get("precision", precision)
    regime = given.get("regime")
    if regime is None:
        if _fits_one_multiprocessor(shape, chip):
            regime = "resident"
        else:
            regime = "persistent" if cooperative and shape.T > 1 else "step"
    if regime == "resident":
        return _resident(shape, given, precision)
    return _spread(shape, chip, given, precision, regime)


def regimes(gates: int, item: int, backward: bool, chip: Chip = H100) -> str:
    """Which regime serves which hidden sizes: of T > 1, a single tile of the batch, products in "ieee" precision."""

    def rank(H: int) -> int:
        made = choose(Shape(gates, backward, 2, 1, H, item), chip)
        return REGIMES.index(made.regime) + (made.regime == "step" or (made.regime == "persistent" and not made.hold))

    ends = [bisect.bisect_right(range(1, LARGEST_TOLD + 1), limit, key=rank) for limit in range(3)]
    names = (REGIMES[0], REGIMES[1], "persistent with streamed weights", REGIMES[2])
    told = [f"{name} to {end}" for name, end in zip(names, ends, strict=False) if end < LARGEST_TOLD]
    return ", ".join([*told, f"{names[len(told)]} beyond"])


def _fits_one_multiprocessor(shape: Shape, chip: Chip) -> bool:
    width = max(16, power_of_two(shape.H))
    weights = shape.gates * width * width * shape.item
    return weights <= RESIDENT_BYTES[shape.item] and weights + 32 * 1024 <= chip.shared


def _resident(shape: Shape, given: dict[str, Any], precision: str) -> Plan:
    BB = given.get("BB", 16)
    width = max(16, power_of_two(shape.H))
    warps = given.get("warps", 8 if width >= 64 else 4)
    tiles = -(-shape.B // BB)
    depth = given.get("depth", 0 if shape.gates * width >= 512 else 1)
    return Plan("resident", BB, width, 1, tiles, warps, 1, True, width, 1, 0, depth, "counter", precision)


def _spread(shape: Shape, chip: Chip, given: dict[str, Any], precision: str, regime: str) -> Plan:
    together = regime == "persistent"
    room = chip.shared - EXCHANGE_BYTES
    accumulators = ACCUMULATORS
    if shape.gates == 4 and shape.backward:  # beside each sum stand four gates and their gradients
        accumulators //= 2
    if shape.item == 4:
        room = min(room, HELD_BYTES_FLOAT32[precision])
        accumulators //= 2 if precision == "tf32x3" else 1
    # Products without tensor cores keep their operands in registers. Where weights are streamed that leaves none for
    # loads ahead, and an LSTM's largest tile forwards spills at some sizes: taken only where the units need it.
    by_hand = shape.item == 4 and precision == "ieee"
    best: tuple[tuple[int, ...], dict[str, Any]] | None = None
    for BB in (given["BB"],) if "BB" in given else BATCH_TILES:
        for BH in (given["BH"],) if "BH" in given else UNIT_TILES:
            columns = shape.columns(BH)
            programs = -(-shape.H // BH)
            chosen = "BB" in given and "BH" in given
            if not chosen and (BB * columns > accumulators or (together and programs > chip.programs)):
                continue
            tiles = -(-shape.B // BB)
            groups = given.get("groups", min(tiles, max(1, chip.programs // programs)) if together else tiles)
            # Times that a group goes through the sequence, and programs that share a multiprocessor in turn.
            rounds = -(-tiles // groups) * -(-programs * groups // chip.programs)
            # A number of the tile for each thread: with fewer, the warps would all compute the same cells.
            warps = given.get("warps", max(1, min(8, BB * BH // 32)))
            depth_of_k = -(-shape.K // (16 * warps)) * 16 * warps
            hold = given.get("hold", together and columns * depth_of_k * shape.item <= room)
            crowded = by_hand and shape.gates == 4 and not shape.backward and 2 * BB * columns > accumulators
            # Registers that suffice, few rounds, weights on chip, little work for a program, few rows of h to fetch.
            cost = (int(crowded), rounds, 0 if hold else 1, BB * BH, BB)
            if best is None or cost < best[0]:
                best = cost, {"BB": BB, "BH": BH, "programs": programs, "groups": groups, "warps": warps, "hold": hold}
    if best is None:  # more units than a cooperative launch can have programs for
        return _spread(shape, chip, given, precision, "step")
    found = best[1]
    warps = found["warps"]
    KC = given.get("KC", _chunk(shape, found["BB"], warps, found["hold"]))
    largest_of_float32 = shape.item == 4 and found["BB"] * shape.columns(found["BH"]) >= ACCUMULATORS
    full, rest = divmod(-(-shape.K // (16 * warps)), KC // 16)
    return Plan(
        regime=regime,
        stages=given.get("stages", 1 if found["hold"] or by_hand else 2),
        KC=KC,
        full=full,
        last=16 * power_of_two(rest) if rest else 0,
        depth=given.get("depth", 1 if largest_of_float32 else 2),
        sync=given.get("sync", "counter"),
        precision=precision,
        **found,
    )


def _chunk(shape: Shape, BB: int, warps: int, hold: bool) -> int:
    """How much of K a warp takes at once: as much as keeps the chunk of h, all warps together, at 16 KiB."""
    if not hold:
        return 16
    KC = max(16, 16 * 1024 // (BB * warps * shape.item))
    return min(KC, 16 * power_of_two(-(-shape.K // (16 * warps))))
