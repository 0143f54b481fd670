"""Tables of Markdown, and the places of a text that a program writes."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> list[str]:
    """Lines of Markdown; the columns from ``numbers_from`` on are aligned to the right."""
    rule = ["---" if place < numbers_from else "---:" for place in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def replaced(text: str, begin: str, end: str, between: str) -> str:
    """``text`` with what lies between two markers replaced.

    Raises:
        ValueError: it has no such markers.
    """
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"expected the markers {begin!r} and {end!r}")
    return f"{before}{begin}\n{between}{end}{after}"
