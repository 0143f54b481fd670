"""Launches of Triton kernels, compiled for a GPU and run here."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from fastseq.kernels.ahead import compiled_ahead
from fastseq.kernels.launch import Launch
from fastseq.ops import dispatch
from ptx.machine import Grid, run
from ptx.program import Program, parse
from ptx.traffic import Traffic

#: Changes the text of a kernel before it runs.
Spoil = Callable[[str], str]


@dataclass
class Replaced:
    """Puts ``instead`` where a pattern matches, and counts how often."""

    pattern: str
    instead: str
    count: int = 0

    def __call__(self, text: str) -> str:
        text, count = re.subn(self.pattern, self.instead, text)
        self.count += count
        return text


_parsed = cache(parse)


def program(text: str, name: str, spoil: Spoil | None) -> Program:
    """The kernel of that name of a file, read once."""
    return _parsed(spoil(text) if spoil else text, name)


def memory_of(tensor: Tensor) -> tuple[int, np.ndarray]:
    """Address and bytes of all that a tensor is a view of."""
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    return storage.data_ptr(), whole.numpy()


@contextlib.contextmanager
def compiled_launches(
    target: str, seed: int = 0, spoil: Spoil | None = None, traffic: Traffic | None = None
) -> Iterator[list[str]]:
    """Inside the ``with`` block the implementation ``triton`` serves CPU tensors, by kernels compiled for one of
    :data:`fastseq.kernels.ahead.TARGETS`; yields which were run."""
    ran: list[str] = []

    def run_one(launch: Launch) -> None:
        run_launch(launch, target, seed + len(ran), spoil, traffic)
        ran.append(launch.kernel.fn.__name__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "run", run_one)
        patch.setattr(dispatch, "_interpreting", lambda: True)
        yield ran


def run_launch(launch: Launch, target: str, seed: int, spoil: Spoil | None, traffic: Traffic | None) -> None:
    """Compiles a launch on CPU tensors and runs it."""
    compiled = compiled_ahead(launch, target)
    parameters = b""
    memories: dict[int, tuple[str, tuple[int, np.ndarray]]] = {}
    for name in launch.kernel.arg_names:
        value = launch.arguments.get(name)
        if name in launch.constants or value is None:
            continue
        kind = "<Q" if isinstance(value, Tensor) else "<f" if isinstance(value, float) else "<i"
        parameters += b"\0" * (-len(parameters) % struct.calcsize(kind))
        parameters += struct.pack(kind, value.data_ptr() if isinstance(value, Tensor) else value)
        if isinstance(value, Tensor) and value.numel():
            base, data = memory_of(value)
            memories.setdefault(base, (name, (base, data)))
    # What Triton would bring for scratch memory and profiling, which no kernel here has.
    assert compiled.metadata.global_scratch_size == compiled.metadata.profile_scratch_size == 0
    parameters += b"\0" * (-len(parameters) % 8 + 16)
    blocks = (*launch.plan.grid, 1, 1)[:3]
    grid = Grid(blocks, 32 * launch.plan.warps, compiled.metadata.shared, cooperative=launch.plan.cooperative)
    made = program(compiled.asm["ptx"], compiled.metadata.name, spoil)
    run(made, grid, parameters, dict(memories.values()), seed, traffic)
