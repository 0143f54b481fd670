"""The CUDA kernels without a GPU: their emulator, built from the same sources, in the place of ``fastseq._cuda``."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_build
import pytest

from fastseq.cuda import extension

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")

needs_launchers = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the launchers import triton, which is not installed"
)


def load(path: Path) -> ModuleType:
    """An emulator that was built."""
    # By a name of its own, since pybind11 hands out the first module of a name again.
    name = f"{path.parent.name}.{cuda_build.EMULATOR}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def emulator() -> ModuleType:
    """The extension as an emulator of a GPU, compiled when its sources have changed."""
    return load(cuda_build.build_emulator(ROOT / "build" / "emulated"))


@contextlib.contextmanager
def emulated(schedule: int = 0, module: ModuleType | None = None) -> Iterator[Any]:
    """Inside the ``with`` block the implementation ``cuda`` serves CPU tensors, by the emulator in this schedule, or
    by another one of it."""
    module = module or emulator()
    before, extension._cuda = extension._cuda, module
    module.set_schedule(schedule)
    try:
        yield module
    finally:
        extension._cuda = before
