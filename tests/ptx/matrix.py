"""Instructions of a whole warp: products of small matrices, and what brings their fragments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.arithmetic import Run, float32_of
from ptx.program import Instruction, Several
from ptx.threads import LANES, Lanes, Threads, address, reader, writer

_LANE = np.arange(LANES)
_GROUP, _MEMBER = _LANE // 4, _LANE % 4


def _numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """``[..., 2]`` numbers of 16 bits, or ``[..., 1]`` of 32, of words ``[...]``, in float64."""
    if kind == "tf32":  # its last bits are not looked at
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    pieces = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return (float32_of(pieces) if kind == "bf16" else pieces.view(np.float16)).astype(np.float64)


def multiply(instruction: Instruction) -> Run:
    """``mma`` of 16 rows and 8 columns, sums in float32."""
    shape, kind = instruction.modifiers[2], instruction.modifiers[6]
    if (shape, kind) not in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")):
        raise ValueError(f"not known here: {instruction.text}")
    width = 2 if shape == "m16n8k16" else 1  # numbers of a word
    depth = 8 * width
    d, a, b, c = instruction.operands
    assert isinstance(d, Several)
    assert isinstance(a, Several)
    assert isinstance(b, Several)
    assert isinstance(c, Several)
    writes = [writer(part, np.float32) for part in d.parts]
    reads_a = [reader(part, np.uint32) for part in a.parts if part is not None]
    reads_b = [reader(part, np.uint32) for part in b.parts if part is not None]
    reads_c = [reader(part, np.float32) for part in c.parts if part is not None]
    inner = _MEMBER[:, None] * width + np.arange(width)

    def run(threads: Threads, lanes: Lanes) -> None:
        size = threads.size(lanes)

        def words(read: Callable[[Threads, Lanes], np.ndarray]) -> np.ndarray:
            return np.broadcast_to(read(threads, lanes), size).reshape(-1, LANES)

        warps = size // LANES
        left, right = np.empty((warps, 16, depth)), np.empty((warps, depth, 8))
        sums = np.empty((warps, 16, 8))
        for number, read in enumerate(reads_a):
            rows, columns = _GROUP + 8 * (number % 2), inner + depth // 2 * (number // 2)
            left[:, rows[:, None], columns] = _numbers(words(read), kind)
        for number, read in enumerate(reads_b):
            right[:, inner + depth // 2 * number, _GROUP[:, None]] = _numbers(words(read), kind)
        for number, read in enumerate(reads_c):
            sums[:, _GROUP + 8 * (number // 2), 2 * _MEMBER + number % 2] = words(read)
        sums = (sums + left @ right).astype(np.float32)
        for number, write in enumerate(writes):
            write(threads, lanes, sums[:, _GROUP + 8 * (number // 2), 2 * _MEMBER + number % 2].ravel())

    return run


def move_matrices(instruction: Instruction) -> Run:
    """``ldmatrix`` and ``stmatrix``: 1, 2 or 4 matrices of 8 by 8 numbers of 16 bits, of which lanes name the rows."""
    loading = instruction.opcode == "ldmatrix"
    count = int(next(part for part in instruction.modifiers if part in ("x1", "x2", "x4"))[1:])
    transposed = instruction.has("trans")
    place, registers = instruction.operands[:: -1 if loading else 1]
    assert isinstance(registers, Several)
    rows = address(place)
    reads = [reader(part, np.uint32) for part in registers.parts if part is not None]
    writes = [writer(part, np.uint32) for part in registers.parts]

    def addresses(threads: Threads, lanes: Lanes) -> np.ndarray:
        return rows(threads, lanes).reshape(-1, LANES)[:, : 8 * count].ravel()

    def warps(threads: Threads, lanes: Lanes) -> np.ndarray:
        return threads.warps_of(lanes).reshape(-1, LANES)[:, : 8 * count].ravel()

    def load(threads: Threads, lanes: Lanes) -> None:
        found = threads.shared_load(addresses(threads, lanes), 16, warps(threads, lanes))
        matrices = found.view(np.uint16).reshape(-1, count, 8, 8)
        for number, write in enumerate(writes):
            matrix = matrices[:, number].transpose(0, 2, 1) if transposed else matrices[:, number]
            pairs = np.ascontiguousarray(matrix).reshape(-1, 8 * 8).view(np.uint32)
            write(threads, lanes, pairs.ravel())

    def store(threads: Threads, lanes: Lanes) -> None:
        size = threads.size(lanes)
        matrices = np.empty((size // LANES, count, 8, 8), np.uint16)
        for number, read in enumerate(reads):
            words = np.ascontiguousarray(np.broadcast_to(read(threads, lanes), size))
            matrix = words.view(np.uint16).reshape(-1, 8, 8)
            matrices[:, number] = matrix.transpose(0, 2, 1) if transposed else matrix
        threads.shared_store(addresses(threads, lanes), matrices.reshape(-1, 8).view(np.uint8), warps(threads, lanes))

    return load if loading else store


def shuffle(instruction: Instruction) -> Run:
    """``shfl.sync`` among all lanes: from a lane, or from the one whose number differs in some bits."""
    mode = instruction.modifiers[1]
    destination, operand, other, clamp, members = instruction.operands
    if mode not in ("bfly", "idx"):
        raise ValueError(f"not known here: {instruction.text}")
    target, valid = destination.parts if isinstance(destination, Several) else (destination, None)
    write, write_valid = writer(target, np.uint32), writer(valid, np.bool_)  # type: ignore[arg-type]
    read, lane, bound, mask = (reader(x, np.uint32) for x in (operand, other, clamp, members))

    def run(threads: Threads, lanes: Lanes) -> None:
        if (mask(threads, lanes) != 0xFFFFFFFF).any() or (bound(threads, lanes) != 31).any():
            raise ValueError(f"not known here: {instruction.text}")
        size = threads.size(lanes)
        given = np.broadcast_to(lane(threads, lanes), size).reshape(-1, LANES).astype(np.int64) & 31
        values = np.broadcast_to(read(threads, lanes), size).reshape(-1, LANES)
        source = given if mode == "idx" else _LANE[None, :] ^ given
        write(threads, lanes, np.take_along_axis(values, source, 1).ravel())
        write_valid(threads, lanes, np.ones(size, np.bool_))

    return run


def reduce(instruction: Instruction) -> Run:
    """``redux.sync`` among all lanes."""
    _, operation, kind = instruction.modifiers
    dtype = np.int32 if kind == "s32" else np.uint32
    function = {"min": np.min, "max": np.max, "add": np.sum}[operation]
    write, read = writer(instruction.operands[0], dtype), reader(instruction.operands[1], dtype)

    def run(threads: Threads, lanes: Lanes) -> None:
        values = np.broadcast_to(read(threads, lanes), threads.size(lanes)).reshape(-1, LANES)
        write(threads, lanes, np.repeat(function(values, axis=1), LANES).astype(dtype))

    return run


MAKERS: dict[str, Callable[[Instruction], Run]] = {
    "mma": multiply,
    "ldmatrix": move_matrices,
    "stmatrix": move_matrices,
    "shfl": shuffle,
    "redux": reduce,
}
