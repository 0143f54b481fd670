"""Instructions of one thread: numbers in, numbers out. A maker for each opcode, which says how to run one."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from ptx.program import Instruction, Register, Several
from ptx.threads import TYPES, UNSIGNED, Lanes, Reader, Threads, reader, writer

Run = Callable[[Threads, Lanes], None]


def bfloat16_of(x: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def float32_of(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 numbers, given as bits, in float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high 16 bits."""
    return bits.astype(np.uint16), (bits >> 16).astype(np.uint16)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two times 16 bits as 32."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


def _elementwise(instruction: Instruction, kind: str, function: Callable[..., Any]) -> Run:
    """The function of operands of a type, also of the pairs in it and of bfloat16."""
    dtype = TYPES[kind]
    write = writer(instruction.operands[0], dtype)  # type: ignore[arg-type]
    reads = [reader(operand, dtype) for operand in instruction.operands[1:]]

    def of_half(*bits: np.ndarray) -> np.ndarray:
        if kind.startswith("bf16"):
            return bfloat16_of(function(*map(float32_of, bits)))
        return np.asarray(function(*(x.view(np.float16) for x in bits)), np.float16).view(np.uint16)

    def of_pairs(*pairs: np.ndarray) -> np.ndarray:
        low, high = zip(*map(halves, pairs), strict=True)
        return joined(of_half(*low), of_half(*high))

    def of_wide_pairs(*pairs: np.ndarray) -> np.ndarray:
        size = max(pair.size for pair in pairs)
        both = (np.ascontiguousarray(np.broadcast_to(pair, size)).view(np.float32) for pair in pairs)
        return np.asarray(function(*both), np.float32).view(np.uint64)

    pairs = of_wide_pairs if kind == "f32x2" else of_pairs
    apply = pairs if kind.endswith("x2") else of_half if kind == "bf16" else function
    return lambda threads, lanes: write(threads, lanes, apply(*(read(threads, lanes) for read in reads)))


def _shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0).astype(a.dtype)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers towards zero; a division by zero is a mistake of the kernel."""
    if not np.all(b):
        raise ZeroDivisionError("an integer division by zero")
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype) if a.dtype.kind == "i" else a // b


def _divide_approximately(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As the instruction is defined: of divisors beyond 2^126 it makes zero, or NaN of an infinity."""
    beyond = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(beyond, np.where(np.isinf(a), np.nan, 0.0), a / b).astype(np.float32)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    wide = np.float64
    return np.asarray(a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (chosen & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(chosen & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * place)
    return result


_SIMPLE: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "fma": _fma,
    "prmt": _prmt,
    "copysign": lambda sign, size: np.copysign(size, sign),
    "ex2": np.exp2,
}


def _folded(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *values: reduce(function, values)


def simple(instruction: Instruction) -> Run:
    """What is one function of operands of one type."""
    *how, kind = instruction.modifiers
    if len(how) == 2 and how[:-1] == ["rn"] and how[-1] == "f32" and kind in ("f16", "bf16"):
        return _mixed(instruction, kind)
    if set(how) - {"rn", "approx", "full"}:
        raise ValueError(f"not known here: {instruction.text}")
    floating = np.dtype(TYPES[kind]).kind == "f"
    name = instruction.opcode
    if name == "div":
        approximate = instruction.has("approx")
        function = _divide_approximately if approximate else (lambda a, b: a / b) if floating else _divide
    elif name in ("min", "max"):
        plain, number = (np.minimum, np.fmin) if name == "min" else (np.maximum, np.fmax)
        function = _folded(number if floating else plain)  # newer GPUs take three
    else:
        function = _SIMPLE[name]
    return _elementwise(instruction, kind, function)


def _mixed(instruction: Instruction, kind: str) -> Run:
    """``add`` and ``sub`` whose first operand is of half type, and all else float32."""
    destination, first, second = instruction.operands
    write, a, b = writer(destination, np.float32), reader(first, TYPES[kind]), reader(second, np.float32)
    widen = float32_of if kind == "bf16" else lambda half: half.astype(np.float32)
    function = _SIMPLE[instruction.opcode]
    return lambda threads, lanes: write(threads, lanes, function(widen(a(threads, lanes)), b(threads, lanes)))


def multiply(instruction: Instruction) -> Run:
    """Integers' ``mul`` and ``mad``, low half or twice as wide; floating-point ``mul``."""
    kind = instruction.modifiers[-1]
    if np.dtype(TYPES[kind]).kind == "f" or "f" in kind:
        return simple(instruction)
    narrow = TYPES[kind]
    if instruction.has("wide"):
        wide: Any = f"{np.dtype(narrow).kind}{2 * np.dtype(narrow).itemsize}"
    elif instruction.has("lo"):
        wide = narrow
    else:
        raise ValueError(f"not known here: {instruction.text}")
    destination, first, second, *more = instruction.operands
    write, a, b = writer(destination, wide), reader(first, narrow), reader(second, narrow)
    c = reader(more[0], wide) if more else None

    def run(threads: Threads, lanes: Lanes) -> None:
        product = a(threads, lanes).astype(wide) * b(threads, lanes).astype(wide)
        write(threads, lanes, product if c is None else product + c(threads, lanes))

    return run


def shift(instruction: Instruction) -> Run:
    """``shl`` and ``shr``; the count is 32 bits of whatever type."""
    destination, operand, count = instruction.operands
    dtype = TYPES[instruction.modifiers[-1]]
    write, a, b = writer(destination, dtype), reader(operand, dtype), reader(count, np.uint32)
    function = _shift_left if instruction.opcode == "shl" else _shift_right
    return lambda threads, lanes: write(threads, lanes, function(a(threads, lanes), b(threads, lanes)))


def extract(instruction: Instruction) -> Run:
    """``bfe``: some bits of 32, of a signed type with the sign of the last of them."""
    destination, operand, first, count = instruction.operands
    signed = instruction.has("s32")
    write = writer(destination, np.int32 if signed else np.uint32)
    a, place, length = reader(operand, np.uint32), reader(first, np.uint32), reader(count, np.uint32)

    def run(threads: Threads, lanes: Lanes) -> None:
        at = np.minimum(place(threads, lanes).astype(np.int64) & 255, 63)
        bits = np.minimum(length(threads, lanes).astype(np.int64) & 255, 32)
        whole = a(threads, lanes).view(np.int32 if signed else np.uint32).astype(np.int64)
        found = (whole >> at) & ((1 << bits) - 1)
        sign = (1 << bits) >> 1 if signed else 0
        write(threads, lanes, ((found ^ sign) - sign).astype(np.int32 if signed else np.uint32))

    return run


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & ~_either_nan(a, b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: (a == b) | _either_nan(a, b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_either_nan(a, b),
    "nan": lambda a, b: _either_nan(a, b),
}


def _either_nan(a: Any, b: Any) -> Any:
    return np.isnan(a) | np.isnan(b)


def compare(instruction: Instruction) -> Run:
    """``setp``, of pairs into two predicates."""
    if len(instruction.modifiers) != 2:
        raise ValueError(f"not known here: {instruction.text}")
    comparison, kind = instruction.modifiers
    destination, first, second = instruction.operands
    a, b = reader(first, TYPES[kind]), reader(second, TYPES[kind])
    function = _COMPARE[comparison]
    if kind.endswith("x2"):
        assert isinstance(destination, Several)
        writes = [writer(part, np.bool_) for part in destination.parts]
        read = float32_of if kind == "bf16x2" else lambda bits: bits.view(np.float16)

        def pairs(threads: Threads, lanes: Lanes) -> None:
            both = zip(halves(a(threads, lanes)), halves(b(threads, lanes)), writes, strict=True)
            for left, right, write in both:
                write(threads, lanes, function(read(left), read(right)))

        return pairs
    write = writer(destination, np.bool_)
    return lambda threads, lanes: write(threads, lanes, function(a(threads, lanes), b(threads, lanes)))


def select(instruction: Instruction) -> Run:
    """``selp``."""
    destination, first, second, condition = instruction.operands
    dtype = TYPES[instruction.modifiers[-1]]
    write, a, b = writer(destination, dtype), reader(first, dtype), reader(second, dtype)
    p = reader(condition, np.bool_)
    return lambda threads, lanes: write(
        threads, lanes, np.where(p(threads, lanes), a(threads, lanes), b(threads, lanes)).astype(dtype)
    )


def move(instruction: Instruction) -> Run:
    """``mov`` and ``cvta``, and taking registers apart or joining them."""
    kind = instruction.modifiers[-1]
    dtype = TYPES[kind]
    destination, source = instruction.operands
    if isinstance(destination, Several):
        whole = reader(source, dtype)
        part = UNSIGNED[np.dtype(dtype).itemsize // len(destination.parts)]
        writes = [writer(piece, part) for piece in destination.parts]

        def split(threads: Threads, lanes: Lanes) -> None:
            values = np.ascontiguousarray(np.broadcast_to(whole(threads, lanes), threads.size(lanes)))
            for piece, write in zip(values.view(part).reshape(-1, len(writes)).T, writes, strict=True):
                write(threads, lanes, np.ascontiguousarray(piece))

        return split
    write = writer(destination, dtype)
    if isinstance(source, Several):
        part = UNSIGNED[np.dtype(dtype).itemsize // len(source.parts)]
        reads: list[Reader] = [reader(piece, part) for piece in source.parts if piece is not None]

        def join(threads: Threads, lanes: Lanes) -> None:
            pieces = [np.broadcast_to(read(threads, lanes), threads.size(lanes)) for read in reads]
            write(threads, lanes, np.stack(pieces, axis=1).view(dtype)[:, 0])

        return join
    read = reader(source, dtype)
    return lambda threads, lanes: write(threads, lanes, read(threads, lanes))


def _narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """Floating-point numbers in another type, as bits where numpy has none of it."""
    if kind == "bf16":
        return bfloat16_of(values.astype(np.float32))
    if kind == "tf32":  # half away from zero
        return (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return values.astype(TYPES[kind])


def convert(instruction: Instruction) -> Run:
    """``cvt``."""
    *how, to, source = instruction.modifiers
    if set(how) - {"rn", "rna", "rzi"}:
        raise ValueError(f"not known here: {instruction.text}")
    into = np.uint32 if to == "tf32" else TYPES[to]
    write = writer(instruction.operands[0], into)
    reads = [reader(operand, TYPES[source]) for operand in instruction.operands[1:]]
    if to.endswith("x2"):
        kind = to.removesuffix("x2")

        def pair(threads: Threads, lanes: Lanes) -> None:
            high, low = (_narrowed(read(threads, lanes), kind).view(np.uint16) for read in reads)
            write(threads, lanes, joined(low, high))

        return pair
    (read,) = reads
    floating = np.dtype(TYPES[source]).kind == "f" or source == "bf16"

    def run(threads: Threads, lanes: Lanes) -> None:
        values = read(threads, lanes)
        if source == "bf16":
            values = float32_of(values)
        if "f" in to:
            write(threads, lanes, _narrowed(values.astype(np.float64) if not floating else values, to))
        elif floating:
            info = np.iinfo(TYPES[to])
            write(threads, lanes, np.clip(np.trunc(np.nan_to_num(values.astype(np.float64))), info.min, info.max))
        else:
            write(threads, lanes, values.astype(TYPES[to]))

    return run


MAKERS: dict[str, Callable[[Instruction], Run]] = {
    **dict.fromkeys((*_SIMPLE, "div", "min", "max"), simple),
    "mul": multiply,
    "mad": multiply,
    "shl": shift,
    "shr": shift,
    "bfe": extract,
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvta": move,
    "cvt": convert,
}


def guard(register: Register, expected: bool) -> Callable[[Threads, Lanes], np.ndarray]:
    """Which of some threads a guard lets run."""
    read = reader(register, np.bool_)
    return (lambda threads, lanes: read(threads, lanes)) if expected else (lambda threads, lanes: ~read(threads, lanes))
