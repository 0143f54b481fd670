"""What the commands share: the one expected error, optional packages, and files to write."""

import argparse
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastseq import _extras

if TYPE_CHECKING:
    from rich.console import Console


class CommandError(Exception):
    """Something the user can mend: shown as one line, without a traceback; exit status 2."""


def require(name: str, purpose: str, extra: str = "cli") -> ModuleType:
    """Imports the optional package that a command needs, from the extra of that name.

    Raises:
        CommandError: naming the package, what wanted it, and how to install it.
    """
    try:
        return _extras.require(name, extra, purpose)
    except _extras.MissingExtraError as error:
        raise CommandError(str(error)) from None


def default_text(purpose: str) -> str:
    """The English text that every CPython carries.

    Raises:
        CommandError: this Python has been stripped of it.
    """
    from fastseq.models.text import python_documentation

    try:
        return python_documentation()
    except ModuleNotFoundError:
        raise CommandError(f"this Python has no pydoc_data.topics, the text that {purpose} learns") from None


def make_console(width: int = 120) -> "Console":
    """Where a command prints: as wide as the terminal, and ``width`` columns wide in a pipe or a file."""
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=width)


def check_writable(path: Path) -> None:
    """Called before a long run, so that it does not fail after it. An existing file keeps its contents.

    Raises:
        CommandError: when it is a folder, its folder does not exist, or writing is not permitted.
    """
    if path.is_dir():
        raise CommandError(f"cannot write {path}: it is a folder")
    try:
        if path.exists():
            with path.open("ab"):
                pass
        else:
            with tempfile.NamedTemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes ``data`` to ``path``."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None


def add_json_argument(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """The option that every command has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as JSON too")


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return value
