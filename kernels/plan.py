"""Which regime and which tile sizes serve a shape. Plain arithmetic: nothing here imports triton or needs a GPU.

- ``resident``: the recurrent weights fit one SM. One program per tile of the batch walks through the whole sequence
  with the weights and h on chip, and waits for nobody.
- ``persistent``: the weights are spread over the SMs, each program holding the columns of its units in shared memory
  and, of the LSTM, in registers; what does not fit there it reads from the L2 cache at every step. The programs of one
  tile of the batch form a group, which exchanges h through the L2 cache and waits for each other once per step. The
  launch is cooperative: all programs run at once, or it fails.
- ``step``: one launch per step, for a single step and for what does not fit a cooperative launch.

A group that has several tiles of the batch to do takes one after the other, so any batch size fits.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

CHOICES = {"regime", "BB", "BH", "groups", "warps", "stages", "held", "registers", "KC", "depth", "sync", "precision"}
REGIMES = ("resident", "persistent", "step")
SYNCS = ("counter", "flags")
PRECISIONS = ("ieee", "tf32", "tf32x3")

# Loads of h that run ahead of their use where nothing speaks against it.
AHEAD = 2
# Shared memory that a kernel takes for small things.
SMALL_BYTES = 1024
# Sums [BB, columns] that a program's warps keep in registers; twice that spills.
ACCUMULATORS = 1024
# Of weights that are held in part, at most, in bytes and in chunks: with more, the loop that streams the others has too
# few registers and spills.
PART_BYTES, PART_CHUNKS = 160 * 1024, 3
# Of weights that are held whole but have no room in shared memory: of K, what a warp takes at a time, and how many
# bytes a thread may have in its registers, by the compute capability. With more, or tiles of 32 sequences, kernels
# spill.
PIECE = 16
REGISTER_BYTES = {8: 256, 9: 256, 10: 96}
# Of weights that are held whole, in half types, by the number of gates: with more, an Elman layer's spill on sm_100.
HELD_BYTES_HALF = {4: 192 * 1024, 1: 168 * 1024}
# Without tensor cores, and with an operand made of two, the weights take many registers on their way to the product.
HELD_BYTES_FLOAT32 = {"ieee": 24 * 1024, "tf32": 128 * 1024, "tf32x3": 24 * 1024}
HELD_BYTES_AMD = 8 * 1024  # there the compiler keeps them in registers
RESIDENT_BYTES = {2: 128 * 1024, 4: 16 * 1024}  # by the bytes of a number
# Hidden sizes beyond this one are not told apart.
LARGEST_TOLD = 1 << 13
BATCH_TILES = (16, 32)
UNIT_TILES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Chip:
    """What a plan has to know of a GPU: how many programs run at once, one on each multiprocessor, the shared memory
    that one may have, in bytes, and the first number of the compute capability, which is 0 for AMD's."""

    programs: int
    shared: int
    capability: int

    @property
    def amd(self) -> bool:
        """Whether it is AMD's."""
        return self.capability == 0


H100 = Chip(132, 227 * 1024, 9)


@dataclass(frozen=True)
class Cut:
    """The K dimension of a recurrent product in chunks: a warp takes ``registers`` times :data:`PIECE` of it, whose
    weights stay in registers, then ``KC`` at a time, ``full`` times, and then ``last``. Of these chunks the weights of
    the first ``held`` stay in shared memory."""

    KC: int
    full: int
    last: int
    held: int
    registers: int = 0

    @property
    def kept(self) -> str:
        """Where the weights are: "held", "held in part" or "streamed"."""
        if self.held == self.full + (self.last > 0):
            return "held"
        return "held in part" if self.held else "streamed"


@dataclass(frozen=True)
class Plan:
    """How one launch computes. ``BB`` and ``BH`` are tiles of the batch and of the units, ``groups`` and ``programs``
    the grid (``programs`` in each group), ``warps`` those of a program; ``depth`` of the loads of h run ahead."""

    regime: str
    BB: int
    BH: int
    programs: int
    groups: int
    warps: int
    stages: int
    cut: Cut
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
        return (
            f"{self.regime}, {self.groups} groups of {self.programs} programs, "
            f"tiles of {self.BB} sequences by {self.BH} units, weights {self.cut.kept}"
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
    """Inside the ``with`` block plans take these fields, of :data:`CHOICES`, as given; ``held`` is the most chunks,
    and ``registers``, beside it, the most pieces.

    For tests and for measuring.
    """
    unknown = fields.keys() - CHOICES
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

    names = (
        "resident",
        "persistent",
        "persistent with weights held in part",
        "persistent with streamed weights",
        "step",
    )

    def rank(H: int) -> int:
        made = choose(Shape(gates, backward, 2, 1, H, item), chip)
        if made.regime != "persistent":
            return names.index(made.regime)
        return 1 + ("held", "held in part", "streamed").index(made.cut.kept)

    told: list[str] = []
    before = 0
    for limit, name in enumerate(names):
        end = bisect.bisect_right(range(1, LARGEST_TOLD + 1), limit, key=rank)
        if end == LARGEST_TOLD:
            return ", ".join([*told, f"{name} beyond"])
        if end > before:
            told.append(f"{name} to {end}")
        before = end
    raise AssertionError("the last name serves every size")


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
    return Plan("resident", BB, width, 1, tiles, warps, 1, Cut(width, 1, 0, 1), depth, "counter", precision)


def _spread(shape: Shape, chip: Chip, given: dict[str, Any], precision: str, regime: str) -> Plan:
    together = regime == "persistent"
    accumulators = ACCUMULATORS
    if shape.gates == 4 and shape.backward:  # beside each sum stand four gates and their gradients
        accumulators //= 2
    if shape.item == 4 and precision == "tf32x3":
        accumulators //= 2
    # Products without tensor cores keep their operands in registers. Where weights are streamed that leaves none for
    # loads ahead, and an LSTM's largest tile forwards spills at some sizes: taken only where the units need it.
    by_hand = shape.item == 4 and precision == "ieee"
    best: tuple[tuple[int, ...], Cut, dict[str, Any]] | None = None
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
            cut = _cut(shape, chip if together else None, precision, BB, columns, warps, given)
            crowded = by_hand and shape.gates == 4 and not shape.backward and 2 * BB * columns > accumulators
            # Registers that suffice, few rounds, one with weights that are read again for two (reckoned, not measured),
            # little work for a program, few rows of h to fetch.
            again = int(cut.kept != "held")
            cost = (int(crowded), rounds * (1 + again), again, BB * BH, BB)
            if best is None or cost < best[0]:
                best = cost, cut, {"BB": BB, "BH": BH, "programs": programs, "groups": groups, "warps": warps}
    if best is None:  # more units than a cooperative launch can have programs for
        return _spread(shape, chip, given, precision, "step")
    _, cut, found = best
    largest_of_float32 = shape.item == 4 and found["BB"] * shape.columns(found["BH"]) >= ACCUMULATORS
    # Whether streamed weights are read a piece ahead; beside held ones float32 has no registers for it on sm_100.
    scarce = shape.item == 4 and cut.kept == "held in part" and chip.capability == 10
    ahead = cut.kept != "held" and not by_hand and not scarce
    return Plan(
        regime=regime,
        stages=given.get("stages", 2 if ahead else 1),
        cut=cut,
        depth=given.get("depth", 1 if largest_of_float32 else AHEAD),
        sync=given.get("sync", "counter"),
        precision=precision,
        **found,
    )


def _cut(
    shape: Shape, chip: Chip | None, precision: str, BB: int, columns: int, warps: int, given: dict[str, Any]
) -> Cut:
    """All weights on ``chip`` where they fit beside what a step needs, else as many chunks as do, or none; None keeps
    nothing."""
    # As much at once as keeps the chunk of h, all warps together, at 16 KiB.
    sixteens = -(-shape.K // (16 * warps))  # of K, that a warp has
    KC: int = given.get("KC", min(max(16, 16 * 1024 // (BB * warps * shape.item)), 16 * power_of_two(sixteens)))

    def cut(registers: int) -> Cut:
        """With so many pieces in registers, and all chunks held."""
        full, rest = divmod(sixteens - registers, KC // 16)
        last = 16 * power_of_two(rest) if rest else 0
        if last == KC:
            full, last = full + 1, 0
        return Cut(KC, full, last, full + (last > 0), registers)

    whole = cut(0)
    if "held" in given:
        made = cut(min(given.get("registers", 0), sixteens))
        return replace(made, held=min(given["held"], made.held))
    if chip is None:
        return replace(whole, held=0)

    room = chip.shared - SMALL_BYTES
    most = HELD_BYTES_HALF[shape.gates] if shape.item == 2 else HELD_BYTES_FLOAT32[precision]
    if chip.amd:
        most = min(most, HELD_BYTES_AMD)

    def fit(beside: int, most: int) -> int:
        """How much of K a warp can have in shared memory if it needs so many bytes beside."""
        return max(0, min(room - warps * beside, most)) // (warps * columns * shape.item)

    # Beside the weights stand the chunks of h on their way and, after them, the sums of all warps; or one chunk of h
    # and one of the weights that are streamed.
    sums, streamed = BB * columns * 4, 16 * (BB + columns) * shape.item
    lstm = not chip.amd and shape.gates == 4  # an Elman layer's kernels spill
    bytes_of_thread = REGISTER_BYTES.get(chip.capability, 0) if lstm and shape.item == 2 and BB == 16 else 0
    for registers in range(min(32 * bytes_of_thread // (PIECE * columns * shape.item), sixteens - 1) + 1):
        made = cut(registers)
        beside = max(BB * (AHEAD * KC + made.last) * shape.item, sums)
        if made.full * KC + made.last <= fit(beside, most):
            return made
    if lstm and (shape.item == 2 or precision == "tf32"):
        # Else so little fits that it is not worth its registers.
        part = fit(max(BB * AHEAD * KC * shape.item, sums, streamed), min(most, PART_BYTES))
        return replace(whole, held=min(whole.full, PART_CHUNKS, part // KC))
    return replace(whole, held=0)
