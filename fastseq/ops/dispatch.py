"""Which kernel serves an operation: PyTorch's dispatcher chooses by device, and this file among those of one device.

The reference is registered for every device, the C++ kernels for CPU tensors, the Triton and CUDA C++ kernels for CUDA
tensors. ``FASTSEQ_IMPL`` (one of :data:`IMPLEMENTATIONS` or :data:`GPU`, read once per process) or :func:`use` forces
one implementation for everything that follows; one that cannot serve raises. Nothing falls back silently: without the
extension the reference serves CPU tensors and ``python -m fastseq info`` says so. The kernels for CUDA tensors have not
run on a GPU yet, so they serve only when forced; else a CUDA tensor is served by the reference with one warning.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import cpu, cuda

IMPLEMENTATIONS = ("reference", "cpp", "triton", "cuda")
#: Forced, it leaves the choice between the kernels for CUDA tensors to fastseq: those of CUDA C++ for the calls that
#: :mod:`fastseq.cuda.choice` names, Triton's for the others.
GPU = "gpu"
FORCEABLE = (*IMPLEMENTATIONS, GPU)
RECURRENCES = ("lstm", "rnn")
OPS = (*RECURRENCES, "student_t_assignment", "target_distribution", "clustering_loss", "nearest_center")

#: What each operation offers beside its plain form. The reference serves all of it.
OPTIONS = {
    "lstm": (
        "lengths",
        "reset",
        "reset_state",
        "h_mask",
        "zoneout",
        "peephole",
        "layer_norm",
        "cell_clip",
        "grad_clip",
        "recompute",
        "return_states",
    ),
    "rnn": ("lengths", "reset", "reset_state", "h_mask", "grad_clip", "recompute"),
}

#: Which options the kernels of each implementation serve; the one place to enter an option that they have learnt.
#: ``grad_clip``, ``recompute`` and ``return_states`` are about the backward: without gradients they use none.
SERVED = {
    ("cpp", "lstm"): frozenset(OPTIONS["lstm"]),
    ("cpp", "rnn"): frozenset(OPTIONS["rnn"]),
    ("triton", "lstm"): frozenset(("lengths", "reset", "h_mask", "zoneout", "peephole")),
    ("triton", "rnn"): frozenset(("lengths", "reset", "h_mask")),
    ("cuda", "lstm"): frozenset(("lengths", "reset")),
    ("cuda", "rnn"): frozenset(("lengths", "reset")),
} | {("triton", op): frozenset[str]() for op in OPS if op not in RECURRENCES}

_NAMES = {"cpp": "C++", "triton": "Triton", "cuda": "CUDA"}

#: What may be forced for CUDA tensors, and which kernels of it takes a shape. All run on CPU tensors too, for tests:
#: Triton's in its interpreter, those of CUDA C++ in the emulator.
_REGIMES = {
    "triton": "resident, persistent or step by shape",
    "cuda": "cluster, grid or cell by shape",
    GPU: "CUDA C++ where a cluster serves an LSTM or Triton has no room for its weights on chip, else Triton by shape",
}

#: The library ``fastseq`` of ``torch.ops.fastseq``; every operation defines itself in it.
library = torch.library.Library("fastseq", "DEF")

_forced: str | None = os.environ.get("FASTSEQ_IMPL") or None
if _forced is not None and _forced not in FORCEABLE:
    raise RuntimeError(f"FASTSEQ_IMPL: expected one of {', '.join(FORCEABLE)}, got {_forced!r}")


def forced() -> str | None:
    """The implementation that ``FASTSEQ_IMPL`` or :func:`use` forces, or None."""
    return _forced


def why_not(implementation: str, device: str, op: str = "", options: Sequence[str] = ()) -> str | None:
    """The reason why ``implementation`` cannot serve tensors on ``device`` (as ``"cpu"``), or None if it can.

    With ``options``, those of :data:`OPTIONS` that a call of ``op`` uses, all of them have to be served.
    """
    if implementation == "reference":
        return None
    if implementation == "cpp":
        if device != "cpu":
            return f"the C++ kernels serve CPU tensors only, not {device}"
        reason = cpu.why_unavailable()
        return reason if reason is not None or not options else _unserved(implementation, op, options)
    if implementation == GPU:  # whatever CUDA C++ leaves, Triton has to serve
        return why_not("triton", device, op, options)
    if implementation in ("triton", "cuda"):
        reason = _why_not_triton(device) if implementation == "triton" else cuda.why_unavailable(device)
        if reason is None and op and (implementation, op) not in SERVED:
            return f"there are no {_NAMES[implementation]} kernels of {op} yet"
        return reason if reason is not None or not options else _unserved(implementation, op, options)
    return f"expected one of {', '.join(FORCEABLE)}, got {implementation!r}"


def _why_not_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; the CUDA builds of torch bring it)"
    if device == "cuda" or (device == "cpu" and _interpreting()):
        return None
    return f"the Triton kernels serve CUDA tensors only, not {device} (but see TRITON_INTERPRET in CONTRIBUTING.md)"


def _interpreting() -> bool:
    """Whether Triton kernels run in its interpreter in this process, which works on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unserved(implementation: str, op: str, options: Iterable[str]) -> str | None:
    missing = [option for option in options if option not in SERVED.get((implementation, op), ())]
    if not missing:
        return None
    return f"the {_NAMES[implementation]} kernels of {op} do not serve {', '.join(missing)} yet"


def serving(op: str, device: str = "cpu", options: Iterable[str] = ()) -> tuple[str, str]:
    """``(implementation, reason)``: which implementation serves ``op`` with ``options`` on ``device`` now, and why.

    Raises:
        RuntimeError: the forced implementation cannot serve it.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    options = tuple(options)
    for option in options:
        if option not in OPTIONS.get(op, ()):
            raise ValueError(f"options: expected some of {', '.join(OPTIONS.get(op, ()))}, got {option!r}")
    if _forced is not None:
        note = "; not verified on a GPU yet" if _forced in _REGIMES else ""
        regime = f"; {_REGIMES[_forced]}" if note and op in RECURRENCES else ""
        return _choose(device, op, options), "forced" + regime + note
    reason = why_not("cpp", device, op, options)
    if reason is None:
        return "cpp", f"C++ kernels, {cpu.isa()}"
    if device == "cuda":
        there = [name for name in ("triton", "cuda") if why_not(name, device, op) is None]
        if there:
            names = " and ".join(_NAMES[name] for name in there)
            how = " or ".join(f"FASTSEQ_IMPL={name}" for name in there)
            reason = f"the {names} kernels have not been verified on a GPU yet ({how} forces them)"
    if device != "cpu" and op in RECURRENCES:
        reason += "; plain layers use torch's own path"
    return "reference", reason


def _choose(device: str, op: str = "", options: Sequence[str] = ()) -> str:
    if _forced is None:
        return "reference" if why_not("cpp", device, op, options) else "cpp"
    reason = why_not(_forced, device, op, options)
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
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    reasons = [why_not(implementation, device) for device in devices]
    if None not in reasons:
        raise RuntimeError(f"implementation {implementation!r} was asked for, but cannot serve: {reasons[-1]}")
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
            f"fastseq has no verified kernels for {device} tensors: the plain reference serves them",
            stacklevel=3,
        )


def register_kernels(
    name: str,
    reference: Callable[..., Any],
    cpp: Callable[..., Any],
    op: str = "",
    options_used: Callable[..., Sequence[str]] | None = None,
) -> None:
    """Registers the kernels of ``fastseq::name``: ``reference`` for every device, ``cpp`` beside it for the CPU, and
    the launcher of the same name for CUDA tensors, which is imported when it is first wanted. Where the reference
    itself is the kernel for the CPU, it is for all.

    ``op`` is the operation it belongs to, and ``options_used`` tells from the arguments of a call which options of it
    are used.
    """

    def forced_launcher(chosen: str, *args: Any) -> Any:
        return reference(*args) if cpp is reference else _launcher(chosen, name)(*args)

    def for_cpu(*args: Any) -> Any:
        chosen = _choose("cpu", op)
        if chosen in _REGIMES:
            return forced_launcher(chosen, *args)
        return cpp(*args) if chosen == "cpp" else reference(*args)

    def for_cpu_by_options(*args: Any) -> Any:
        assert options_used is not None
        chosen = _choose("cpu", op, options_used(*args))
        if chosen in _REGIMES:
            return forced_launcher(chosen, *args)
        return cpp(*args) if chosen == "cpp" else reference(*args)

    def for_cuda(*args: Any) -> Any:
        chosen = _choose("cuda", op, () if options_used is None else options_used(*args))
        return forced_launcher(chosen, *args) if chosen in _REGIMES else for_others(*args)

    def for_others(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if _choose(device, op) == "reference" and _forced is None:
            _warn_once(device)
        return reference(*args)

    library.impl(name, for_cpu if options_used is None else for_cpu_by_options, "CPU")
    library.impl(name, for_cuda, "CUDA")
    library.impl(name, for_others, "CompositeExplicitAutograd")


@functools.cache
def _launcher(implementation: str, name: str) -> Callable[..., Any]:
    """``lstm_fwd`` of :mod:`fastseq.kernels.lstm`, and so on, with what walks through time by another implementation
    than Triton."""
    stem = name.removesuffix("_").removesuffix("_fwd").removesuffix("_bwd").removesuffix("_options")
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"fastseq.kernels.{stem}"), name)
    if implementation == "cuda":
        recurrences = f"fastseq.cuda.{stem}"
    elif implementation == GPU and stem == "lstm":
        recurrences = "fastseq.cuda.choice"
    else:
        return launcher
    walk = "run_backward" if "_bwd" in name else "run_forward"
    return functools.partial(launcher, recurrence=getattr(importlib.import_module(recurrences), walk))
