"""``python -m fastseq info``: versions, instruction set, threads, and which backend serves each operation and why."""

import argparse
from collections.abc import Iterator
from typing import Any

from fastseq.cli import console


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "info",
        help="versions, instruction set, threads, and which backend serves each operation and why",
        description="Prints what fastseq.info() returns. Put it into a bug report.",
    )
    console.add_json_argument(parser)
    parser.set_defaults(run=run)


def lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested facts as indented lines, the values of one level in a column. Needs no optional package, so that ``info``
    works on every installation."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
            yield f"{indent}{name:<{width}}  {shown}"


def run(args: argparse.Namespace) -> int:
    """Prints the facts; always 0."""
    import fastseq

    facts = fastseq.info()
    print("\n".join(lines(facts)))
    if args.json is not None:
        console.write_json(args.json, facts)
    return 0
