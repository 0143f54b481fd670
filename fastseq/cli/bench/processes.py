"""Cases measured in processes of their own: under another environment, or several times over.

A ratio within one process may be off in every round: the pages that either side got, and where they lie in the caches,
stay as they are. What holds is the process in the middle of several.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastseq.cli import console
from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.measure import Row
from fastseq.cli.bench.results import Run, load


def run(
    cases: Sequence[Case],
    rounds: int,
    memory: bool,
    name: str,
    *,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Run:
    """Measures the cases in a child, which draws its own progress bar.

    Args:
        cases: what to measure.
        rounds: as for the command.
        memory: whether the peak memory of each is measured too.
        name: what an error calls the child.
        environment: variables of the child beside this process's own.
        options: further options of the command.

    Raises:
        CommandError: the child failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "child.json"
        command = [sys.executable, "-m", "fastseq", "bench", "--rounds", str(rounds), "--json", str(target)]
        command += [
            "--threads",
            str(torch.get_num_threads()),
            "--memory" if memory else "--no-memory",
            "--rows-only",
            *options,
        ]
        command += [word for case in cases for word in ("--case", case.key)]
        done = subprocess.run(command, env=os.environ | (environment or {}), check=False)
        if done.returncode != 0:
            raise console.CommandError(f"{name} ended with status {done.returncode}")
        return load(target)


def repeated(cases: Sequence[Case], count: int, rounds: int, memory: bool, options: Sequence[str] = ()) -> list[Row]:
    """The cases in each of ``count`` processes, and of each case the row in the middle."""
    runs = [run(cases, rounds, memory and n == 0, "--processes: one", options=options).rows for n in range(count)]
    return [middle(rows) for rows in zip(*runs, strict=True)]


def middle(rows: Sequence[Row]) -> Row:
    """Of one case's rows from several processes the one whose ratio is in the middle: to the plain layer where that is
    measured, else to torch's. Its memory is the first process's, which alone measures it.
    """
    peer = next((name for name in ("plain", "torch") if name in rows[0].ratios), None)

    def ratio(row: Row) -> float:
        return row.figures["fastseq"].ms.median if peer is None else row.ratios[peer].median

    chosen = sorted(rows, key=ratio)[len(rows) // 2]
    figures = {
        name: replace(value, memory_mib=rows[0].figures[name].memory_mib) for name, value in chosen.figures.items()
    }
    return replace(chosen, figures=figures, processes=len(rows))
