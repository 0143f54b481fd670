"""Parses the command line and runs one command; turns the expected errors into one line and a non-zero exit status."""

import argparse
import os
import sys
from collections.abc import Sequence

from fastseq._version import __version__
from fastseq.cli import bench, check, console, dec, demo, info, lm


def build_parser() -> argparse.ArgumentParser:
    """The whole parser, one sub-parser per command."""
    parser = argparse.ArgumentParser(
        prog="python -m fastseq",
        description="fastseq: fast, exact recurrent networks for PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"fastseq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (info, check, demo, dec, lm, bench):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (``sys.argv[1:]`` when None).

    Returns:
        0 when the command succeeded, 1 when it found something wrong (a mismatch), 2 when it could not run.
    """
    args = build_parser().parse_args(argv)
    try:
        for path in (args.json, getattr(args, "out", None)):
            if path is not None:
                console.check_writable(path)
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except console.CommandError as error:
        print(f"fastseq {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastseq {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone. Point stdout elsewhere, so that its flush at exit is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
