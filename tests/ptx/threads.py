"""The registers of a block's threads, and how operands are read and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.program import Address, Immediate, Operand, Register, Symbol

#: Indices of threads, ascending; None for all of the block.
Lanes = np.ndarray | None
Reader = Callable[["Threads", Lanes], Any]
Writer = Callable[["Threads", Lanes, Any], None]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LANES = 32


class Threads:
    """``count`` threads with a value of every register, at first of no meaning."""

    def __init__(self, count: int, bits: list[int], special: dict[str, Any]) -> None:
        self.count = count
        self.special = special
        self.registers = [
            np.zeros(count, np.bool_)
            if wide == 1
            else np.full(count, 0xA5A5A5A5A5A5A5A5, np.uint64).astype(f"u{wide // 8}")
            for wide in bits
        ]
        self.warp = np.arange(count) // LANES

    def shared_load(self, addresses: np.ndarray, each: int, warps: np.ndarray) -> np.ndarray:
        """``[n, each]`` bytes of the block's shared memory, by these warps."""
        raise NotImplementedError

    def shared_store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """``values [n, each]`` bytes into it."""
        raise NotImplementedError

    def warps_of(self, lanes: Lanes) -> np.ndarray:
        """The warp of each thread, among all of the launch."""
        return self.warp if lanes is None else self.warp[lanes]

    def size(self, lanes: Lanes) -> int:
        """How many threads these are."""
        return self.count if lanes is None else len(lanes)


def constant(value: int, dtype: Any) -> Any:
    """A number as the operand of an instruction of that type; of floating-point numbers it is the bits."""
    if dtype is np.bool_:
        return np.array(value != 0)
    wide = np.dtype(dtype).itemsize
    return np.array(value & ((1 << 8 * wide) - 1), np.uint64).astype(UNSIGNED[wide]).view(dtype)


def reader(operand: Operand, dtype: Any) -> Reader:
    """The values of an operand, as a function; the low bits of a register that is wider than the type."""
    if isinstance(operand, Register):
        slot, wide = operand.slot, np.dtype(dtype).itemsize
        if operand.bits in (1, 8 * wide):
            return lambda threads, lanes: (
                threads.registers[slot] if lanes is None else threads.registers[slot][lanes]
            ).view(dtype)
        return lambda threads, lanes: (
            (threads.registers[slot] if lanes is None else threads.registers[slot][lanes])
            .astype(UNSIGNED[wide])
            .view(dtype)
        )
    if isinstance(operand, Immediate):
        value = constant(operand.value, dtype)
        return lambda threads, lanes: value
    if isinstance(operand, Symbol):
        name = operand.name

        def special(threads: Threads, lanes: Lanes) -> Any:
            value = threads.special[name]
            if isinstance(value, np.ndarray):
                return (value if lanes is None else value[lanes]).astype(dtype)
            return constant(value, dtype)

        return special
    raise ValueError(f"not an operand to read: {operand}")


def writer(operand: Operand | None, dtype: Any) -> Writer:
    """Sets a register to values of a type, widened by their sign where the register is wider."""
    if operand is None:
        return lambda threads, lanes, values: None
    assert isinstance(operand, Register), operand
    slot, wide = operand.slot, np.dtype(dtype).itemsize
    store = np.bool_ if operand.bits == 1 else UNSIGNED[operand.bits // 8]
    widen = operand.bits != 1 and operand.bits // 8 > wide

    def write(threads: Threads, lanes: Lanes, values: Any) -> None:
        values = np.asarray(values, dtype)
        values = values.astype(store) if widen or operand.bits == 1 else values.view(store)
        # Always a new array, since others may be views of the old one.
        if lanes is None:
            threads.registers[slot] = np.array(np.broadcast_to(values, threads.count))
        else:
            fresh = threads.registers[slot].copy()
            fresh[lanes] = values
            threads.registers[slot] = fresh

    return write


def address(operand: Operand) -> Reader:
    """The addresses ``[n]`` of an address operand."""
    assert isinstance(operand, Address), operand
    wide = np.uint32 if isinstance(operand.base, Register) and operand.base.bits == 32 else np.uint64
    base, offset = reader(operand.base, wide), operand.offset

    def addresses(threads: Threads, lanes: Lanes) -> np.ndarray:
        return np.broadcast_to(base(threads, lanes).astype(np.int64) + offset, threads.size(lanes))

    return addresses
