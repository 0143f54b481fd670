"""From the text of one kernel to its instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Bits of a register by the type it is declared with; a predicate has one.
WIDTHS = {"pred": 1, "b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32} | dict.fromkeys(
    ("b64", "u64", "s64", "f64"), 64
)


@dataclass(frozen=True)
class Register:
    """A register of every thread: its number within the kernel, and its bits."""

    slot: int
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A number: an integer, or the bits of a floating-point number."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """What stands for an address or a place: shared memory, a parameter, a special register, a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Several:
    """``{a, b}`` or ``a|b``; None where a result is not wanted (``_``)."""

    parts: tuple[Register | Immediate | None, ...]


Operand = Register | Immediate | Symbol | Address | Several


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode.modifiers operands``; ``expected`` is the guard's value that lets it run."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    expected: bool
    text: str

    def has(self, modifier: str) -> bool:
        """Whether the opcode carries this modifier."""
        return modifier in self.modifiers


@dataclass
class Program:
    """One kernel. ``labels`` are places in ``instructions``; ``parameters`` their offsets in the bytes that a launch
    brings; ``shared`` the alignment of what it calls its shared memory."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: dict[str, int]
    shared: dict[str, int]
    registers: list[int]
    """Bits of each."""


_TOKEN = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<line>\.(?:loc|file)\b[^\n]*)|(?P<end>[^;]*);)")
_ENTRY = r"\.visible \.entry {}\((.*?)\)\s*((?:\.[^{{\n]*\n)*)\{{"
_GUARDED = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_SIZES = {"b8": 1, "u32": 4, "s32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8, "s64": 8, "u8": 1}


def kernels(text: str) -> list[str]:
    """The names of the kernels of a file."""
    return re.findall(r"\.visible \.entry (\w+)\(", text)


def parse(text: str, name: str) -> Program:
    """The kernel of that name of a file.

    Raises:
        ValueError: the file has no such kernel, or it is not written as the compilers write.
    """
    text = re.sub(r"//[^\n]*", "", text)
    head = re.search(_ENTRY.format(re.escape(name)), text, re.DOTALL)
    if head is None:
        raise ValueError(f"no kernel {name}, but {', '.join(kernels(text))}")
    shared = {symbol: int(align) for align, symbol in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[\]", text)}
    parsed = _Parser(Program(name, [], {}, _parameters(head.group(1)), shared, []))
    parsed.body(text, head.end())
    return parsed.program


def _parameters(text: str) -> dict[str, int]:
    places, end = {}, 0
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        kind, name, count = re.search(r"\.(\w+)\s+(?:\.ptr[ .\w]*\s)?(\w+)(?:\[(\d+)\])?$", piece).groups()  # type: ignore[union-attr]
        aligned = re.search(r"\.param\s+\.align (\d+)", piece)
        if count:
            kind = "b8"
        elif ".ptr" in piece:
            kind = "u64"
        size = _SIZES[kind] * int(count or 1)
        align = int(aligned.group(1)) if aligned else size
        places[name] = -(-end // align) * align
        end = places[name] + size
    return places


@dataclass
class _Parser:
    program: Program
    # Innermost last: registers by name, families of registers, labels under their own name.
    scopes: list[dict[str, Register | str]] = field(default_factory=list)
    families: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    # An instruction's own scopes, for labels that come after it.
    waiting: list[tuple[int, list[dict[str, Register | str]]]] = field(default_factory=list)

    def body(self, text: str, at: int) -> None:
        self.scopes.append({})
        while self.scopes:
            token = _TOKEN.match(text, at)
            if token is None:
                raise ValueError(f"not understood: {text[at : at + 80]!r}")
            at = token.end()
            if token.group("brace") == "{":
                self.scopes.append({})
            elif token.group("brace") == "}":
                self.scopes.pop()
            elif token.group("label"):
                own = f"{token.group('label')} {len(self.program.labels)}"
                self.scopes[-1][token.group("label")] = own
                self.program.labels[own] = len(self.program.instructions)
            elif token.group("end"):
                self.statement(token.group("end").strip())
        for index, scopes in self.waiting:
            self.resolve(index, scopes)

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.DOTALL).groups()  # type: ignore[union-attr]
            for name in (name.strip() for name in names.split(",")):
                family = re.match(r"(%\w+)<(\d+)>$", name)
                first, bits = len(self.program.registers), WIDTHS[kind]
                self.program.registers.extend([bits] * (int(family.group(2)) if family else 1))
                if family:
                    self.families[family.group(1)] = (first, int(family.group(2)), bits)
                else:
                    self.scopes[-1][name] = Register(first, bits)
        elif not text.startswith("."):
            negated, guard, opcode, rest = _GUARDED.match(text).groups()  # type: ignore[union-attr]
            name, *modifiers = opcode.split(".")
            operands = tuple(self.operand(piece) for piece in _pieces(rest))
            condition = self.register(guard) if guard else None
            made = Instruction(name, tuple(modifiers), operands, condition, not negated, " ".join(text.split()))
            if name == "bra":
                self.waiting.append((len(self.program.instructions), list(self.scopes)))
            self.program.instructions.append(made)

    def resolve(self, index: int, scopes: list[dict[str, Register | str]]) -> None:
        """Gives a branch the label that its name means where it stands."""
        branch = self.program.instructions[index]
        (label,) = branch.operands
        assert isinstance(label, Symbol)
        own = next(scope[label.name] for scope in reversed(scopes) if label.name in scope)
        assert isinstance(own, str)
        self.program.instructions[index] = Instruction(
            "bra", branch.modifiers, (Symbol(own),), branch.guard, branch.expected, branch.text
        )

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            found = scope.get(name)
            if isinstance(found, Register):
                return found
        numbered = re.match(r"(%[a-z]+)(\d+)$", name)
        if numbered and numbered.group(1) in self.families:
            first, count, bits = self.families[numbered.group(1)]
            if int(numbered.group(2)) < count:
                return Register(first + int(numbered.group(2)), bits)
        return None

    def operand(self, text: str) -> Operand:
        if text.startswith("["):
            base, sign, offset = re.match(r"\[\s*([^\s+\-\]]+)\s*(?:([+-])\s*(-?\d+))?\s*\]$", text).groups()  # type: ignore[union-attr]
            where = self.simple(base)
            assert where is not None
            return Address(where, int(offset or 0) * (-1 if sign == "-" else 1))
        if text.startswith("{"):
            return Several(tuple(self.part(piece) for piece in _pieces(text[1:-1])))
        if "|" in text:
            return Several(tuple(self.part(piece) for piece in text.split("|")))
        if text == "_":
            return Several((None,))
        return self.simple(text)

    def part(self, text: str) -> Register | Immediate | None:
        if text.strip() == "_":
            return None
        found = self.simple(text.strip())
        assert not isinstance(found, Symbol), text
        return found

    def simple(self, text: str) -> Register | Immediate | Symbol:
        if re.match(r"-?\d", text):
            if text[:2] in ("0f", "0F", "0d", "0D"):
                return Immediate(int(text[2:], 16))
            return Immediate(int(text.rstrip("U"), 0))
        return self.register(text) or Symbol(text)


def _pieces(text: str) -> list[str]:
    """What commas separate outside braces and brackets."""
    found, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            found.append(text[start:at])
            start = at + 1
    found.append(text[start:])
    return [piece.strip() for piece in found if piece.strip()]
