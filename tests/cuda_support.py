"""The CUDA kernels without a GPU: their emulator, built from the same sources, in the place of ``fastseq._cuda``."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastseq.cuda import extension

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

import cuda_build  # noqa: E402

COMPILER = shutil.which("g++")

needs_launchers = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the launchers import triton, which is not installed"
)


@cache
def emulator() -> ModuleType:
    """The extension as an emulator of a GPU, compiled when its sources have changed."""
    path = cuda_build.build_emulator(ROOT / "build" / "emulated")
    spec = importlib.util.spec_from_file_location(cuda_build.EMULATOR, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(schedule: int = 0) -> Iterator[Any]:
    """Inside the ``with`` block the implementation ``cuda`` serves CPU tensors, by the emulator in this schedule."""
    module = emulator()
    before, extension._cuda = extension._cuda, module
    module.set_schedule(schedule)
    try:
        yield module
    finally:
        extension._cuda = before
