"""Instructions that read and write memory, by themselves or through a copy engine, and those that order them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.memory import Fault
from ptx.program import Instruction, Operand, Several
from ptx.threads import TYPES, Lanes, address, reader, writer

if TYPE_CHECKING:
    from ptx.machine import Block

Run = Callable[["Block", Lanes], None]

_STRONG = {"volatile", "relaxed", "acquire", "release"}


def _parts(operand: Operand) -> tuple[Any, ...]:
    return operand.parts if isinstance(operand, Several) else (operand,)


def _space(instruction: Instruction) -> str:
    for modifier in instruction.modifiers:
        if modifier.partition("::")[0] in ("global", "shared", "param"):
            return modifier.partition("::")[0]
    raise ValueError(f"not known here: {instruction.text}")


def load(instruction: Instruction) -> Run:
    """``ld``, one number or several that follow one another."""
    space, strong = _space(instruction), bool(_STRONG & set(instruction.modifiers))
    dtype = TYPES[instruction.modifiers[-1]]
    destination, place = instruction.operands
    writes = [writer(part, dtype) for part in _parts(destination)]
    each = np.dtype(dtype).itemsize * len(writes)
    addresses = address(place)

    def run(block: Block, lanes: Lanes) -> None:
        at = addresses(block, lanes)
        if space == "param":
            found = block.parameters[at[:, None] + np.arange(each)]
        else:
            warps = block.warps_of(lanes)
            if instruction.has("nc"):
                block.machine.expect_unwritten(at, each)
            found = block.read(space, at, each, warps, None if strong else block.machine.clocks)
            if strong:
                block.machine.heard(at, warps, acquire=instruction.has("acquire"))
                block.yields = True
        values = np.ascontiguousarray(found).view(dtype)
        for number, write in enumerate(writes):
            write(block, lanes, np.ascontiguousarray(values[:, number]))

    return run


def store(instruction: Instruction) -> Run:
    """``st``."""
    space, strong = _space(instruction), bool(_STRONG & set(instruction.modifiers))
    dtype = TYPES[instruction.modifiers[-1]]
    place, source = instruction.operands
    reads = [reader(part, dtype) for part in _parts(source)]
    addresses = address(place)

    def run(block: Block, lanes: Lanes) -> None:
        at, warps, size = addresses(block, lanes), block.warps_of(lanes), block.size(lanes)
        values = np.stack([np.broadcast_to(read(block, lanes), size) for read in reads], axis=1)
        clocks = block.machine.clocks
        if strong:
            for where, warp in zip(at, warps, strict=True):
                block.machine.tell(int(where), int(warp), release=instruction.has("release"), keep=False)
        block.write(space, at, values.view(np.uint8), warps, None if strong else clocks)

    return run


def atomic(instruction: Instruction) -> Run:
    """``atom``: of 32 bits in global memory, a lane after the other."""
    operation, kind = instruction.modifiers[-2:]
    dtype = TYPES[kind]
    destination, place, *rest = instruction.operands
    write, addresses, given = writer(destination, dtype), address(place), reader(rest[0], dtype)
    function = {"add": lambda old, new: old + new, "exch": lambda old, new: new}[operation]

    def run(block: Block, lanes: Lanes) -> None:
        at, warps, size = addresses(block, lanes), block.warps_of(lanes), block.size(lanes)
        values, before = np.broadcast_to(given(block, lanes), size), np.empty(size, dtype)
        for number in range(size):
            one = slice(number, number + 1)
            before[one] = block.read("global", at[one], 4, warps[one], None).view(dtype)[:, 0]
            after = np.asarray(function(before[one], values[one]), dtype)
            machine, where, warp = block.machine, int(at[number]), int(warps[number])
            if {"acquire", "acq_rel"} & set(instruction.modifiers):
                machine.heard(at[one], warps[one], acquire=True)
            if {"release", "acq_rel"} & set(instruction.modifiers):
                machine.tell(where, warp, release=True, keep=True)
            if (after != before[one]).any():
                block.write("global", at[one], after[:, None].view(np.uint8), warps[one], None)
        write(block, lanes, before)
        block.yields = True

    return run


def copy(instruction: Instruction) -> Run:
    """``cp.async`` and what commits such copies and waits for them. They are made when somebody waits, not sooner."""
    if instruction.has("bulk"):
        return _bulk_copy(instruction)
    if instruction.has("commit_group"):
        return lambda block, lanes: block.commit_copies(lanes)
    if instruction.has("wait_group") or instruction.has("wait_all"):
        kept = int(instruction.operands[0].value) if instruction.operands else 0  # type: ignore[union-attr]
        return lambda block, lanes: block.wait_copies(lanes, kept, instruction.has("wait_all"))
    to, source, size, *rest = instruction.operands
    into, out_of, count = address(to), address(source), int(size.value)  # type: ignore[union-attr]
    read = reader(rest[0] if rest else size, np.uint32)

    def run(block: Block, lanes: Lanes) -> None:
        targets, sources, warps = into(block, lanes), out_of(block, lanes), block.warps_of(lanes)
        given = np.broadcast_to(read(block, lanes), block.size(lanes))

        def finish() -> None:
            values = np.zeros((len(targets), count), np.uint8)
            for length in np.unique(given[given > 0]):
                chosen = given == length
                values[chosen, :length] = block.read(
                    "global", sources[chosen], int(length), warps[chosen], block.machine.clocks
                )
            block.write("shared", targets, values, warps, block.machine.clocks)

        block.copies.append(finish)

    return run


def _bulk_copy(instruction: Instruction) -> Run:
    """Into shared memory by the copy engine, which tells a barrier there."""
    to, source, size, barrier = instruction.operands
    into, out_of, signal = address(to), address(source), address(barrier)
    count = reader(size, np.uint32)

    def run(block: Block, lanes: Lanes) -> None:
        warps = block.warps_of(lanes)
        counts = np.broadcast_to(count(block, lanes), block.size(lanes))
        rows = zip(into(block, lanes), out_of(block, lanes), counts, signal(block, lanes), warps, strict=True)
        for target, origin, length, place, warp in rows:
            if length % 16 or target % 16 or origin % 16:
                raise Fault(f"{instruction.text}: addresses and bytes are not multiples of 16")
            # What this warp knows now is what the engine goes by.
            passed = block.machine.clocks.release(warp)
            block.copy_barrier(int(place)).copies.append(_engine(block, int(target), int(origin), int(length), passed))

    return run


def _engine(
    block: Block, target: int, origin: int, length: int, seen: np.ndarray
) -> Callable[[], tuple[int, np.ndarray]]:
    def finish() -> tuple[int, np.ndarray]:
        clocks, steps = block.machine.clocks, np.arange(0, length, 16)
        warps = np.full(len(steps), block.engine)
        clocks.acquire(block.engine, seen)
        values = block.read("global", origin + steps, 16, warps, clocks)
        block.write("shared", target + steps, values, warps, clocks)
        return length, clocks.release(block.engine)

    return finish


def barrier(instruction: Instruction) -> Run:
    """``mbarrier``: of one arrival that tells how many bytes will come."""
    action = instruction.modifiers[0]
    if action == "init":
        place, number = instruction.operands
        at, count = address(place), reader(number, np.uint32)

        def init(block: Block, lanes: Lanes) -> None:
            arrivals = np.broadcast_to(count(block, lanes), block.size(lanes))
            for where, expected in zip(at(block, lanes), arrivals, strict=True):
                block.new_copy_barrier(int(where), int(expected))

        return init
    if action == "arrive" and instruction.has("expect_tx"):
        _, place, number = instruction.operands
        at, count = address(place), reader(number, np.uint32)

        def arrive(block: Block, lanes: Lanes) -> None:
            counts = np.broadcast_to(count(block, lanes), block.size(lanes))
            for where, length, warp in zip(at(block, lanes), counts, block.warps_of(lanes), strict=True):
                block.copy_barrier(int(where)).arrive(int(length), block.machine.clocks.release(warp))
            block.machine.progress += 1

        return arrive
    if action == "try_wait" and instruction.has("parity"):
        done, place, number = instruction.operands
        write, at, parity = writer(done, np.bool_), address(place), reader(number, np.uint32)

        def wait(block: Block, lanes: Lanes) -> None:
            size, warps, places = block.size(lanes), block.warps_of(lanes), at(block, lanes)
            wanted, passed = np.broadcast_to(parity(block, lanes), size), np.empty(size, np.bool_)
            for where, which in {(int(w), int(p)) for w, p in zip(places, wanted, strict=True)}:
                those = (places == where) & (wanted == which)
                passed[those] = block.wait_copy_barrier(where, which, np.unique(warps[those]))
            write(block, lanes, passed)
            if not passed.all():
                block.yields = True

        return wait
    raise ValueError(f"not known here: {instruction.text}")


def remote(instruction: Instruction) -> Run:
    """``mapa``: the address of the same place of another block of the cluster."""
    destination, place, rank = instruction.operands
    write, at, other = writer(destination, np.uint32), reader(place, np.uint32), reader(rank, np.uint32)
    return lambda block, lanes: write(block, lanes, block.remote(at(block, lanes), other(block, lanes)))


def fence(instruction: Instruction) -> Run:
    """``fence`` and ``membar``: what relaxed reads have heard counts from here."""

    def run(block: Block, lanes: Lanes) -> None:
        for warp in np.unique(block.warps_of(lanes)):
            block.machine.fence(int(warp))

    return run


MAKERS: dict[str, Callable[[Instruction], Run]] = {
    "ld": load,
    "st": store,
    "atom": atomic,
    "cp": copy,
    "mbarrier": barrier,
    "mapa": remote,
    "fence": fence,
    "membar": fence,
}
