"""Launches of the CUDA C++ kernels, compiled by nvcc and run here.

The extension's own host code chooses the kernel, the grid and the parameters: as in the emulator, whose last step this
takes over.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_build
import numpy as np
import pytest
from torch import Tensor

from fastseq.cpu.memory import address
from fastseq.cuda import lstm, rnn, steps
from ptx.launches import Spoil, memory_of, program
from ptx.machine import Grid, run
from ptx.program import kernels
from ptx.traffic import Traffic

FOLDER = Path(__file__).resolve().parents[2] / "build" / "ptx"


@cache
def _compiled(target: str) -> dict[str, str]:
    """The PTX of every source by the names of its kernels."""
    folder = FOLDER / cuda_build.digest_of(cuda_build.CUDA_SOURCES, target)
    with cuda_build.alone(folder):
        wanted = {path: folder / f"{path.stem}.ptx" for path, to in cuda_build.CUDA_SOURCES.items() if target in to}
        missing = {path: made for path, made in wanted.items() if not made.exists()}
        compiler = cuda_build.nvcc()
        assert compiler is not None
        parts = {made: made.with_suffix(".unfinished") for made in missing.values()}
        commands = [cuda_build.ptx_command(compiler, path, parts[made], target) for path, made in missing.items()]
        cuda_build.run_all(commands, 2)
        for made, part in parts.items():
            part.rename(made)
    texts = [made.read_text() for made in wanted.values()]
    return {name: text for text in texts for name in kernels(text)}


@cache
def _names(module: str) -> dict[int, str]:
    """The names of the kernels of an emulator by their places in its file."""
    told = subprocess.run(["nm", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in told.splitlines()]
    return {int(place, 16): name for place, _, name in rows}


@contextlib.contextmanager
def compiled_kernels(
    module: ModuleType, target: str, seed: int = 0, spoil: Spoil | None = None, traffic: Traffic | None = None
) -> Iterator[list[tuple[str, Grid]]]:
    """Inside the ``with`` block the launches of an emulator run as compiled for a target; yields which they were."""
    ran: list[tuple[str, Grid]] = []
    known: dict[int, tuple[int, np.ndarray]] = {}

    def noted(tensor: Tensor | None) -> int:
        if tensor is not None and tensor.numel():
            base, data = memory_of(tensor)
            known[base] = (base, data)
        return address(tensor)

    def noted_row(tensor: Tensor | None, t: int | None) -> int:
        noted(tensor)
        return row(tensor, t)

    def launch(place: int, sizes: tuple[int, int, int], shared: int, cooperative: bool, parameters: bytes) -> None:
        blocks, cluster, threads = sizes
        name = _names(str(module.__file__))[place]
        grid = Grid((blocks, 1, 1), threads, shared, cluster, cooperative)
        memories = {f"tensor at {base:#x}": memory for base, memory in known.items()}
        run(program(_compiled(target)[name], name, spoil), grid, parameters, memories, seed + len(ran), traffic)
        ran.append((name, grid))

    row: Any = steps.row
    with pytest.MonkeyPatch.context() as patch:
        for place in (lstm, rnn, steps):
            patch.setattr(place, "address", noted)
        for place in (lstm, rnn):
            patch.setattr(place, "row", noted_row)
        module.set_launcher(launch)
        try:
            yield ran
        finally:
            module.set_launcher(None)
