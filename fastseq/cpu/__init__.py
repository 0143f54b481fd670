"""Launchers of the C++ kernels in ``fastseq._cpu``: tensors in, pointers down, tensors out.

An extension that was never built is allowed, and said by :func:`why_unavailable`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastseq.cpu import clustering_loss, lstm, nearest_center, rnn, stack, step, student_t, target_distribution
from fastseq.cpu.extension import _cpu

__all__ = [
    "available",
    "clustering_loss",
    "isa",
    "isas",
    "lstm",
    "nearest_center",
    "rnn",
    "stack",
    "step",
    "student_t",
    "target_distribution",
    "use_isa",
    "use_split_rows",
    "why_unavailable",
]


def available() -> bool:
    """Whether the C++ kernels can serve CPU tensors."""
    return _cpu is not None


def why_unavailable() -> str | None:
    """The reason why :func:`available` is False, or None."""
    return None if available() else "the extension fastseq._cpu was not built: reinstall with a C++ compiler present"


def isa() -> str:
    """The instruction set in use, such as ``"avx512"``; ``"none"`` without the extension."""
    return "none" if _cpu is None else str(_cpu.isa())


def isas() -> list[str]:
    """The compiled instruction sets that this machine can run, best first."""
    return [] if _cpu is None else list(_cpu.isas())


@contextlib.contextmanager
def _setting(write: str, read: str, value: object) -> Iterator[None]:
    """A setting of the extension has ``value`` inside the ``with`` block, in every thread of the process."""
    before = getattr(_cpu, read)()
    getattr(_cpu, write)(value)
    try:
        yield
    finally:
        getattr(_cpu, write)(before)


def use_isa(name: str) -> contextlib.AbstractContextManager[None]:
    """Run the C++ kernels with instruction set ``name`` inside the ``with`` block, in every thread of the process.

    Raises:
        RuntimeError: there is no extension, or ``name`` was not compiled or cannot run on this machine.
    """
    if _cpu is None:
        raise RuntimeError(why_unavailable())
    return _setting("use_isa", "isa", name)


def use_split_rows(rows: int) -> contextlib.AbstractContextManager[None]:
    """From a batch of ``rows`` on, let the instruction set amx make the products of a float32 step of bfloat16 terms.

    For tests: with 1 small cases reach those kernels too. It has no effect on other instruction sets and dtypes.
    """
    if not hasattr(_cpu, "set_split_rows"):  # another architecture
        return contextlib.nullcontext()
    return _setting("set_split_rows", "split_rows", rows)
