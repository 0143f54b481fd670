"""Blocks of threads that run a program, and what lets them wait for each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ptx import arithmetic, matrix, transfers
from ptx.clocks import Clocks, merged
from ptx.memory import Fault, Memory, Region
from ptx.program import Immediate, Instruction, Program, Symbol
from ptx.threads import LANES, Lanes, Threads, reader
from ptx.traffic import Traffic

#: Instructions that a block does before another has its turn; fewer where it asks for what another one tells.
TURN = 2000
#: Turns of all blocks without anything that another block could have waited for.
PATIENCE = 3000
#: Where a block's shared memory begins, and where that of the cluster's blocks does, by their rank.
_SHARED, _WINDOW = 1024, 1 << 24
#: How often a barrier of the copy engine is asked in vain before the copies come.
_LATE = 2


@dataclass(frozen=True)
class Grid:
    """A launch: blocks along x, y and z, the threads of each, bytes of shared memory; ``cluster`` blocks along x are
    launched together, or all with ``cooperative``."""

    blocks: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int = 1
    cooperative: bool = False


@dataclass
class CopyBarrier:
    """A barrier in shared memory for arrivals and bytes. Each of ``copies`` makes a copy when it is called, and returns
    its bytes and what it passes on."""

    expected: int
    phase: int = 0
    arrived: int = 0
    missing: int = 0
    asked: int = 0
    copies: list[Callable[[], tuple[int, np.ndarray]]] = field(default_factory=list)
    seen: np.ndarray | None = None
    before: np.ndarray | None = None

    def arrive(self, length: int, seen: np.ndarray) -> None:
        """One arrival, which tells of bytes to come."""
        self.missing += length
        self.arrived += 1
        self.seen = merged(self.seen, seen)
        self._open()

    def ask(self) -> bool:
        """Somebody asks for the end of the phase in vain; the late copies come after some times. Whether they came."""
        self.asked += 1
        if self.asked <= _LATE or not self.copies:
            return False
        for finish in self.copies:
            length, passed = finish()
            self.missing -= length
            self.seen = merged(self.seen, passed)
        self.copies.clear()
        self._open()
        return True

    def _open(self) -> None:
        if self.arrived == self.expected and self.missing == 0:
            self.phase += 1
            self.arrived = self.asked = 0
            self.before, self.seen = self.seen, None


class Cluster:
    """Blocks that are launched together and meet at a barrier in two halves."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.completed = 0
        self.arrived = 0
        self.seen: np.ndarray | None = None
        self.before: np.ndarray | None = None

    def open_if_complete(self) -> None:
        """Opens the barrier if every thread that there is has arrived."""
        if self.arrived and self.arrived == sum(block.alive for block in self.blocks):
            self.completed += 1
            self.arrived = 0
            self.before, self.seen = self.seen, None


class Block(Threads):
    """The threads of a block. Those at the same instruction do it at once; behind goes first."""

    def __init__(self, machine: Machine, number: int, place: tuple[int, int, int], cluster: Cluster, rank: int) -> None:
        grid, program = machine.grid, machine.program
        size = grid.threads
        special: dict[str, Any] = {"%tid.x": np.arange(size), "%laneid": np.arange(size) % LANES}
        special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.x": size, "%ntid.y": 1, "%ntid.z": 1}
        special |= {f"%ctaid.{axis}": at for axis, at in zip("xyz", place, strict=True)}
        special |= {f"%nctaid.{axis}": count for axis, count in zip("xyz", grid.blocks, strict=True)}
        special |= {"%cluster_ctarank": rank, "%cluster_nctarank": grid.cluster}
        special |= dict(program.parameters)
        # No more than is promised.
        self.base = _SHARED + max(program.shared.values(), default=16)
        special |= dict.fromkeys(program.shared, self.base)
        super().__init__(size, program.registers, special)
        self.machine, self.cluster, self.number = machine, cluster, number
        warps = -(-size // LANES)
        self.warp = self.warp + number * warps
        self.engine = machine.warps + number  # the copy engine counts as a warp
        memory = np.full(grid.shared, 0xFF, np.uint8)
        self.shared = Region(f"shared memory of block {number}", self.base, memory, number * warps, warps)
        self.parameters = machine.parameters
        self.groups: dict[int, np.ndarray] = {0: np.arange(size)}
        self.parked: dict[int, np.ndarray] = {}
        self.barriers: dict[int, list[tuple[int, np.ndarray]]] = {}
        self.in_cluster: list[tuple[int, np.ndarray, int]] = []
        self.arrivals = np.zeros(size, np.int64)
        self.copy_barriers: dict[int, CopyBarrier] = {}
        self.copies: list[Callable[[], None]] = []
        self.committed: list[list[Callable[[], None]]] = []
        self.alive = size
        self.yields = False
        self.place = 0  # of the instruction that is done now

    # What instructions ask for.

    def _regions(self, space: str, addresses: np.ndarray) -> list[tuple[Region, Any, np.ndarray]]:
        if space == "global":
            return [(region, at, addresses[at]) for region, at in self.machine.memory.parts(addresses)]
        ranks = addresses // _WINDOW
        parts = []
        for rank in np.unique(ranks):
            chosen = np.flatnonzero(ranks == rank)
            if rank > len(self.cluster.blocks):
                raise Fault(f"address {addresses[chosen][0]:#x} is of no block of the cluster")
            block = self if rank == 0 else self.cluster.blocks[rank - 1]
            parts.append((block.shared, chosen, addresses[chosen] % _WINDOW))
        return parts

    def read(
        self, space: str, addresses: np.ndarray, each: int, warps: np.ndarray, clocks: Clocks | None
    ) -> np.ndarray:
        """``[n, each]`` bytes of a memory."""
        self._count(space, addresses, each, warps)
        found = np.empty((len(addresses), each), np.uint8)
        for region, at, part in self._regions(space, addresses):
            found[at] = region.load(part, each, warps[at], clocks)
        return found

    def write(
        self, space: str, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray, clocks: Clocks | None
    ) -> None:
        """Stores ``values [n, each]`` bytes."""
        self._count(space, addresses, values.shape[1], warps)
        for region, at, part in self._regions(space, addresses):
            region.store(part, values[at], warps[at], clocks)
            if region is not self.shared:
                self.machine.progress += 1

    def _count(self, space: str, addresses: np.ndarray, each: int, warps: np.ndarray) -> None:
        traffic, program = self.machine.traffic, self.machine.program
        if traffic is not None and space == "shared" and self.number < traffic.blocks:
            traffic.note(program.name, program.instructions[self.place].text, addresses % _WINDOW, each, warps)

    def shared_load(self, addresses: np.ndarray, each: int, warps: np.ndarray) -> np.ndarray:
        """Of the block's own shared memory."""
        return self.read("shared", addresses, each, warps, self.machine.clocks)

    def shared_store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """Into the block's own shared memory."""
        self.write("shared", addresses, values, warps, self.machine.clocks)

    def remote(self, addresses: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """The addresses of the same places in the shared memory of other blocks of the cluster."""
        return np.asarray(addresses + (ranks + 1) * np.uint32(_WINDOW), np.uint32)

    def new_copy_barrier(self, place: int, expected: int) -> None:
        """A barrier of the copy engine there."""
        self.copy_barriers[place] = CopyBarrier(expected)

    def copy_barrier(self, place: int) -> CopyBarrier:
        """The barrier of the copy engine that was made there."""
        if place not in self.copy_barriers:
            raise Fault(f"no barrier was made at {place}")
        return self.copy_barriers[place]

    def wait_copy_barrier(self, place: int, parity: int, warps: np.ndarray) -> bool:
        """Whether the phase of that parity has ended, after which these warps have seen what came before its end."""
        barrier, machine = self.copy_barrier(place), self.machine
        if barrier.phase % 2 == parity:
            machine.progress += barrier.ask()
            return False
        if barrier.before is not None:
            for warp in warps:
                machine.clocks.acquire(int(warp), barrier.before)
        return True

    def commit_copies(self, lanes: Lanes) -> None:
        """The copies since the last time are one batch."""
        self._expect_all(lanes)
        self.committed.append(self.copies)
        self.copies = []

    def wait_copies(self, lanes: Lanes, kept: int, uncommitted: bool) -> None:
        """Makes the copies of all batches but the last ``kept``."""
        self._expect_all(lanes)
        if uncommitted:
            self.commit_copies(lanes)
        count = len(self.committed) - kept
        for batch in self.committed[: max(0, count)]:
            for finish in batch:
                finish()
        del self.committed[: max(0, count)]

    def _expect_all(self, lanes: Lanes) -> None:
        if self.size(lanes) != self.alive:
            raise Fault("copies are committed or waited for by some threads of the block only")

    # Running.

    def add(self, place: int, lanes: np.ndarray) -> None:
        """These threads go on there, with others that are there already."""
        if len(lanes):
            with_them = self.groups.get(place)
            self.groups[place] = lanes if with_them is None else np.union1d(with_them, lanes)

    def turn(self) -> None:
        """Some instructions, if there are any to do."""
        self._leave_cluster_barrier()
        left = TURN
        self.yields = False
        while self.groups and left > 0 and not self.yields:
            place = min(self.groups)
            lanes = self.groups.pop(place)
            left -= self._straight(place, lanes, left)

    def _straight(self, place: int, threads: np.ndarray, limit: int) -> int:
        """From one place on until a branch, a barrier or others on the way; how many instructions it were."""
        code = self.machine.code
        until = min(self.groups, default=-1)
        lanes: Lanes = None if len(threads) == self.count else threads
        done = 0
        while True:
            if place == until or done >= limit or self.yields:
                self.add(place, threads)
                return done
            kind, run, guard = code[place]
            self.place = place
            done += 1
            active, mask = lanes, None
            if guard is not None:
                mask = np.broadcast_to(guard(self, lanes), len(threads))
                if not mask.all():
                    active = threads[mask]
            if kind is None:
                if mask is None or mask.any():
                    self._do(run, active)
                place += 1
                continue
            if mask is not None and not mask.all():
                self.add(place + 1, threads[~mask])
                threads = threads[mask]
            if len(threads):
                kind(self, place, threads)
            return done

    def _do(self, run: Callable[[Block, Lanes], None], lanes: Lanes) -> None:
        """The instruction at ``place``; a fault says where it is."""
        try:
            run(self, lanes)
        except (Fault, ValueError, ZeroDivisionError) as fault:
            text = self.machine.program.instructions[self.place].text
            raise Fault(f"block {self.number}, instruction {self.place}, {text}: {fault}") from fault

    def branch(self, place: int, threads: np.ndarray) -> None:
        """To where the label is."""
        (label,) = self.machine.program.instructions[place].operands
        assert isinstance(label, Symbol)
        self.add(self.machine.program.labels[label.name], threads)

    def leave(self, place: int, threads: np.ndarray) -> None:
        """These threads end."""
        self.alive -= len(threads)
        self.machine.progress += 1
        self.cluster.open_if_complete()
        if self.alive:
            for number in list(self.barriers):
                self._open_if_complete(number, None)
            return
        barriers = self.copy_barriers.values()
        if self.copies or any(self.committed) or any(barrier.copies for barrier in barriers):
            raise Fault(f"block {self.number} ends while copies are under way")
        self.shared.alive = False

    def whole_warps(self, place: int, threads: np.ndarray) -> np.ndarray:
        """Of these threads and those that wait here those whose warp is whole; the others wait."""
        if place in self.parked:
            threads = np.union1d(self.parked.pop(place), threads)
        if len(threads) == self.count:
            return threads
        counts = np.bincount(threads // LANES, minlength=-(-self.count // LANES))
        whole = counts[threads // LANES] == LANES
        if not whole.all():
            self.parked[place] = threads[~whole]
        return threads[whole]

    def together(self, place: int, threads: np.ndarray) -> None:
        """An instruction that all lanes of a warp do at once."""
        threads = self.whole_warps(place, threads)
        if not len(threads):
            return
        run = self.machine.code[place][1]
        if run is not None:
            self._do(run, None if len(threads) == self.count else threads)
        self.add(place + 1, threads)

    def block_barrier(self, place: int, threads: np.ndarray) -> None:
        """``bar.sync``, of all threads or as many as it says."""
        threads = self.whole_warps(place, threads)
        if not len(threads):
            return
        operands = self.machine.program.instructions[place].operands
        numbers, counts = (
            np.broadcast_to(reader(operand, np.uint32)(self, threads), len(threads))
            for operand in (*operands, Immediate(0))[:2]
        )
        for number in np.unique(numbers):
            chosen = numbers == number
            self.barriers.setdefault(int(number), []).append((place + 1, threads[chosen]))
            self._open_if_complete(int(number), int(counts[chosen][0]) or None)

    def _open_if_complete(self, number: int, count: int | None) -> None:
        waiting = self.barriers[number]
        arrived = sum(len(threads) for _, threads in waiting)
        if arrived == (self.alive if count is None else count):
            del self.barriers[number]
            self.machine.clocks.meet(np.unique(np.concatenate([self.warp[threads] for _, threads in waiting])))
            for place, threads in waiting:
                self.add(place, threads)

    def cluster_barrier(self, place: int, threads: np.ndarray) -> None:
        """``barrier.cluster.arrive`` and ``wait``."""
        threads = self.whole_warps(place, threads)
        if not len(threads):
            return
        if self.machine.program.instructions[place].has("wait"):
            self.in_cluster.append((place + 1, threads, int(self.arrivals[threads].max())))
            self._leave_cluster_barrier()
            return
        cluster, clocks = self.cluster, self.machine.clocks
        for warp in np.unique(self.warp[threads]):
            cluster.seen = merged(cluster.seen, clocks.release(int(warp)))
        self.arrivals[threads] += 1
        cluster.arrived += len(threads)
        self.machine.progress += 1
        cluster.open_if_complete()
        self.add(place + 1, threads)

    def _leave_cluster_barrier(self) -> None:
        waiting, self.in_cluster = self.in_cluster, []
        for place, threads, arrival in waiting:
            if self.cluster.completed < arrival:
                self.in_cluster.append((place, threads, arrival))
                continue
            assert self.cluster.before is not None
            for warp in np.unique(self.warp[threads]):
                self.machine.clocks.acquire(int(warp), self.cluster.before)
            self.add(place, threads)

    def state(self) -> str:
        """Where its threads are, for a message."""
        text = self.machine.program.instructions
        places = [*self.groups, *self.parked, *(at - 1 for group in self.barriers.values() for at, _ in group)]
        waiting = "; ".join(f"{at} {text[at].text}" for at in places) or "waits for its cluster"
        return f"block {self.number}, {self.alive} threads: {waiting}"


Control = Callable[[Block, int, np.ndarray], None]
_CONTROL: dict[str, Control] = {"bra": Block.branch, "ret": Block.leave, "exit": Block.leave}


def _decoded(instruction: Instruction) -> tuple[Control | None, Any, Any]:
    """How to run an instruction: what decides where threads go on, if not just after it; what it does; its guard."""
    condition = instruction.guard
    guard = None if condition is None else arithmetic.guard(condition, instruction.expected)
    name = instruction.opcode
    if name in _CONTROL:
        return _CONTROL[name], None, guard
    if name == "bar" and instruction.has("warp"):
        return Block.together, None, guard
    if name == "bar" and instruction.has("sync"):
        return Block.block_barrier, None, guard
    if name == "barrier" and instruction.has("cluster"):
        return Block.cluster_barrier, None, guard
    if name in matrix.MAKERS:
        return Block.together, matrix.MAKERS[name](instruction), guard
    for makers in (arithmetic.MAKERS, transfers.MAKERS):
        if name in makers:
            return None, makers[name](instruction), guard
    raise ValueError(f"not known here: {instruction.text}")


class Machine:
    """One launch."""

    def __init__(
        self,
        program: Program,
        grid: Grid,
        parameters: bytes,
        memories: Mapping[str, tuple[int, np.ndarray]],
        seed: int,
        traffic: Traffic | None,
    ) -> None:
        self.program, self.grid, self.traffic = program, grid, traffic
        self.parameters = np.frombuffer(parameters, np.uint8)
        count = int(np.prod(grid.blocks))
        self.warps = count * -(-grid.threads // LANES)
        self.clocks = Clocks(self.warps + count)
        self.memory = Memory(
            [Region(name, base, data, 0, self.warps + count) for name, (base, data) in memories.items()]
        )
        self.code = [_decoded(instruction) for instruction in program.instructions]
        self.released: dict[int, np.ndarray] = {}
        self.listened: dict[int, np.ndarray] = {}
        self.progress = 0
        self.random = random.Random(seed)
        self.waves = self._waves()

    def _waves(self) -> list[list[Block]]:
        """The blocks that are on the machine together, wave after wave; as few as the launch promises."""
        width, height, depth = self.grid.blocks
        clusters: dict[tuple[int, int, int], Cluster] = {}
        for number, (z, y, x) in enumerate(product(range(depth), range(height), range(width))):
            cluster = clusters.setdefault((x // self.grid.cluster, y, z), Cluster())
            cluster.blocks.append(Block(self, number, (x, y, z), cluster, x % self.grid.cluster))
        waves = [list(cluster.blocks) for cluster in clusters.values()]
        self.random.shuffle(waves)
        return [[block for wave in waves for block in wave]] if self.grid.cooperative else waves

    def run(self) -> None:
        """All blocks to their end.

        Raises:
            Fault: the kernel does what it must not, or waits for ever.
        """
        with np.errstate(all="ignore"):
            for wave in self.waves:
                self._run(wave)

    def _run(self, blocks: list[Block]) -> None:
        idle, before = 0, self.progress
        while blocks:
            self.random.shuffle(blocks)
            for block in blocks:
                for _ in range(self.random.randint(1, 4)):
                    block.turn()
            idle = idle + 1 if self.progress == before else 0
            before = self.progress
            blocks = [block for block in blocks if block.alive]
            stuck = blocks and not any(block.groups or block.in_cluster for block in blocks)
            if stuck or idle > PATIENCE:
                raise Fault("no thread can go on: " + " | ".join(block.state() for block in blocks))

    def heard(self, addresses: np.ndarray, warps: np.ndarray, *, acquire: bool) -> None:
        """Reads of what may be signals: who acquires has seen what was released, others after a fence."""
        for address, warp in {(int(a), int(w)) for a, w in zip(addresses, warps, strict=True)}:
            passed = self.released.get(address)
            if passed is None:
                continue
            if acquire:
                self.clocks.acquire(warp, passed)
            else:
                self.listened[warp] = merged(self.listened.get(warp), passed)

    def fence(self, warp: int) -> None:
        """What this warp has heard counts from here."""
        known = self.listened.pop(warp, None)
        if known is not None:
            self.clocks.acquire(warp, known)

    def tell(self, address: int, warp: int, *, release: bool, keep: bool) -> None:
        """A signal; ``keep`` what others have released by it before."""
        before = self.released.pop(address, None)
        if release:
            self.released[address] = merged(before if keep else None, self.clocks.release(warp))

    def expect_unwritten(self, addresses: np.ndarray, each: int) -> None:
        """Raises a Fault where this launch has written what a load takes for constant."""
        for region, at in self.memory.parts(addresses):
            if region.was_written(addresses[at], each):
                raise Fault(f"{region.name}: loaded as constant, and written by this launch")


def run(
    program: Program,
    grid: Grid,
    parameters: bytes,
    memories: Mapping[str, tuple[int, np.ndarray]],
    seed: int = 0,
    traffic: Traffic | None = None,
) -> None:
    """Runs one launch. ``memories`` are the tensors by name: address and bytes; the seed chooses whose turn it is, and
    ``traffic`` takes note of what is asked of shared memory.

    Raises:
        Fault: the kernel does what it must not.
        ValueError: it has an instruction that is not known here.
    """
    Machine(program, grid, parameters, memories, seed, traffic).run()
