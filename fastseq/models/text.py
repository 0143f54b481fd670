"""Text as numbers: characters or words, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from torch import Tensor

UNKNOWN = "<unk>"  # a word that the vocabulary lacks
END = "<eos>"  # the end of a line


@dataclass(frozen=True)
class Vocabulary:
    """What the numbers mean.

    Attributes:
        level: ``"char"`` or ``"word"``. Words are what white space parts; the end of a line is the word ``<eos>``.
        tokens: the token of each number. Characters are in the order of their code points.
    """

    level: str
    tokens: tuple[str, ...]

    @classmethod
    def of_characters(cls, text: str) -> Self:
        """All characters of ``text``."""
        return cls("char", tuple(map(chr, numpy.unique(_code_points(text)))))

    @classmethod
    def of_words(cls, text: str, size: int | None = None) -> Self:
        """The words of ``text``, the most frequent first: all, or ``size`` with ``<unk>`` and ``<eos>``.

        Raises:
            ValueError: ``size`` is less than 3.
        """
        if size is not None and size < 3:
            raise ValueError(f"size: expected None or a whole number of at least 3, got {size!r}")
        counts = Counter(_words(text))
        for special in (UNKNOWN, END):
            counts.pop(special, None)
        # Ties in the order of the alphabet, so that the same text gives the same numbers.
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls("word", (UNKNOWN, END, *ordered[: None if size is None else size - 2]))

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> Tensor:
        """int64 [N]. A word that is not known becomes ``<unk>``.

        Raises:
            ValueError: a character is not known; the message says which and where.
        """
        if self.level == "word":
            number = {word: index for index, word in enumerate(self.tokens)}
            unknown = number[UNKNOWN]
            return torch.tensor([number.get(word, unknown) for word in _words(text)], dtype=torch.int64)
        codes, known = _code_points(text), _code_points("".join(self.tokens))
        found = numpy.searchsorted(known, codes)
        strange = numpy.flatnonzero(known[numpy.minimum(found, len(known) - 1)] != codes)
        if len(strange):
            character = text[strange[0]]
            raise ValueError(
                f"the character {character!r} (U+{ord(character):04X}) at position {strange[0]} of the text is none of "
                f"the {len(self)} that the vocabulary has"
            )
        return torch.from_numpy(found.astype(numpy.int64))

    def decode(self, numbers: Tensor) -> str:
        """The text of numbers [N]; words are parted by one space, and lines by a line feed."""
        tokens = [self.tokens[number] for number in numbers.tolist()]
        if self.level == "char":
            return "".join(tokens)
        parts: list[str] = []
        for token in tokens:
            if token == END:
                parts.append("\n")
            else:
                parts.append(token if not parts or parts[-1].endswith("\n") else f" {token}")
        return "".join(parts)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"level": self.level, "tokens": list(self.tokens)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """The way back from :meth:`state`."""
        return cls(state["level"], tuple(state["tokens"]))


def python_documentation() -> str:
    """The help on Python's own topics, 0.46 MB of English that every CPython carries (``pydoc_data.topics``).

    Raises:
        ModuleNotFoundError: this Python has been stripped of it.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _words(text: str) -> list[str]:
    words: list[str] = []
    for line in text.splitlines():
        words += line.split()
        words.append(END)
    if text and not text.endswith("\n"):
        words.pop()  # a text that stops within a line
    return words


def _code_points(text: str) -> numpy.ndarray[Any, numpy.dtype[numpy.uint32]]:
    return numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
