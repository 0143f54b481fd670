"""Which kernel serves an operation: PyTorch's dispatcher chooses by device, and this file among those of one device.

The reference is registered for every device and the C++ kernels for CPU tensors. ``FASTSEQ_IMPL`` (one of
:data:`IMPLEMENTATIONS`, read once per process) or :func:`use` forces one implementation for everything that follows;
one that cannot serve raises. Nothing falls back silently: without the extension the reference serves CPU tensors and
``python -m fastseq info`` says so; a CUDA tensor is served by the reference with one warning.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastseq import cpu

IMPLEMENTATIONS = ("reference", "cpp", "triton", "cuda")
OPS = ("lstm", "rnn")

#: The library ``fastseq`` of ``torch.ops.fastseq``; every operation defines itself in it.
library = torch.library.Library("fastseq", "DEF")

_forced: str | None = os.environ.get("FASTSEQ_IMPL") or None
if _forced is not None and _forced not in IMPLEMENTATIONS:
    raise RuntimeError(f"FASTSEQ_IMPL: expected one of {', '.join(IMPLEMENTATIONS)}, got {_forced!r}")


def forced() -> str | None:
    """The implementation that ``FASTSEQ_IMPL`` or :func:`use` forces, or None."""
    return _forced


def why_not(implementation: str, device: str) -> str | None:
    """The reason why ``implementation`` cannot serve tensors on ``device`` (as ``"cpu"``), or None if it can."""
    if implementation == "reference":
        return None
    if implementation == "cpp":
        return f"the C++ kernels serve CPU tensors only, not {device}" if device != "cpu" else cpu.why_unavailable()
    if implementation in IMPLEMENTATIONS:
        return f"this version of fastseq has no {implementation} kernels"
    return f"expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"


def serving(op: str, device: str = "cpu") -> tuple[str, str]:
    """``(implementation, reason)``: which implementation serves ``op`` on ``device`` now, and why.

    Raises:
        RuntimeError: the forced implementation cannot serve it.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    if _forced is not None:
        return _choose(device), "forced"
    reason = why_not("cpp", device)
    if reason is None:
        return "cpp", f"C++ kernels, {cpu.isa()}"
    return "reference", reason if device == "cpu" else f"{reason}; plain layers use torch's own path"


def _choose(device: str) -> str:
    if _forced is None:
        return "reference" if why_not("cpp", device) else "cpp"
    reason = why_not(_forced, device)
    if reason is not None:
        raise RuntimeError(f"implementation {_forced!r} was asked for, but cannot serve: {reason}")
    return _forced


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation inside the ``with`` block, in every thread of the process.

    Raises:
        RuntimeError: there is no such implementation, or it cannot serve on this machine at all.
    """
    global _forced
    reason = why_not(implementation, "cpu")
    if reason is not None:
        raise RuntimeError(f"implementation {implementation!r} was asked for, but cannot serve: {reason}")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


_warned: set[str] = set()


def _warn_once(device: str) -> None:
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"fastseq has no kernels for {device} tensors yet: the plain PyTorch reference serves them, step by step",
            stacklevel=3,
        )


def register_kernels(
    name: str,
    reference: Callable[..., Any],
    cpp: Callable[..., Any],
) -> None:
    """Registers the kernels of ``fastseq::name``: ``reference`` for every device, ``cpp`` beside it for the CPU."""

    def for_cpu(*args: Any) -> Any:
        return cpp(*args) if _choose("cpu") == "cpp" else reference(*args)

    def for_others(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if _choose(device) == "reference" and _forced is None:
            _warn_once(device)
        return reference(*args)

    library.impl(name, for_cpu, "CPU")
    library.impl(name, for_others, "CompositeExplicitAutograd")
