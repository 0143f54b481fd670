"""``fastseq.info()``: what is installed, what this machine can run, and which backend serves each operation and why."""

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastseq import cpu, cuda
from fastseq._version import __version__
from fastseq.cuda import plan as cuda_plan
from fastseq.kernels import plan
from fastseq.ops import dispatch

SWITCHES = ("FASTSEQ_IMPL", "FASTSEQ_CPU_ISA", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def info() -> dict[str, Any]:
    """Facts about this installation and this process, ready for JSON; ``python -m fastseq info`` prints them.

    Returns:
        A dictionary with

        - ``fastseq``, ``torch``, ``python``, ``platform``: versions;
        - ``cpu``: ``model``; ``kernels``, whether the C++ kernels are there; ``why_unavailable``, None or the reason;
          ``isa``, the instruction set in use; ``isas``, those compiled that run here, best first; ``threads``, as
          ``torch.get_num_threads()`` has it; ``cores``, how many this process may use; ``openmp``, the OpenMP libraries
          that the process has loaded (more than one is a fault: they would compete for the cores);
        - ``triton``: its version or None; only the kernels for CUDA tensors need it;
        - ``triton_regimes``: for each recurrence, pass and size of a number, the hidden sizes that each regime of the
          Triton kernels (see :mod:`fastseq.kernels.plan`) serves, on this GPU, or where there is none on an H100;
        - ``cuda``: ``available`` and ``device``, as torch has them; ``kernels``, whether the CUDA C++ kernels are
          there; ``why_unavailable``, None or the reason; ``lstm_regimes``, None or by pass which hidden sizes each
          regime of those kernels serves in half types, as for Triton;
        - ``ops``: for each operation and device, ``backend`` (None when a forced one cannot serve), ``why``, and
          ``options``: the backend of each option of the operation (of its backward, for those that are about that);
        - ``switches``: the environment variables that change any of this, None where not set.
    """
    has_cuda = torch.cuda.is_available()
    return {
        "fastseq": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "kernels": cpu.available(),
            "why_unavailable": cpu.why_unavailable(),
            "isa": cpu.isa(),
            "isas": cpu.isas(),
            "threads": torch.get_num_threads(),
            "cores": _usable_cores(),
            "openmp": _openmp_libraries(),
        },
        "triton": _triton_version(),
        "triton_regimes": _triton_regimes(),
        "cuda": {
            "available": has_cuda,
            "device": torch.cuda.get_device_name() if has_cuda else None,
            "kernels": cuda.why_unavailable("cuda") is None,
            "why_unavailable": cuda.why_unavailable("cuda"),
            "lstm_regimes": _cuda_regimes(),
        },
        "ops": {op: {device: _served(op, device) for device in ("cpu", "cuda")} for op in dispatch.OPS},
        "switches": {name: os.environ.get(name) for name in SWITCHES},
    }


def _served(op: str, device: str) -> dict[str, Any]:
    backend, why = _backend(op, device)
    options = {option: _backend(op, device, option)[0] for option in dispatch.OPTIONS.get(op, ())}
    return {"backend": backend, "why": why, "options": options}


def _backend(op: str, device: str, *options: str) -> tuple[str | None, str]:
    try:
        return dispatch.serving(op, device, options)
    except RuntimeError as error:  # a forced implementation that cannot serve: to be reported, not raised
        return None, str(error)


def _triton_version() -> str | None:
    """Read from its metadata, since importing it takes long; PyTorch's nightly builds bring it under another name."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _triton_regimes() -> dict[str, Any]:
    chip = plan.H100
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        # AMD's has one number, NVIDIA's the one that a kernel may ask for beside the one that it gets unasked.
        shared = getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)
        chip = plan.Chip(facts.multi_processor_count, shared, 0 if torch.version.hip else facts.major)
    return {
        op: {
            f"{which}, {8 * item} bit": plan.regimes(gates, item, which == "backward", chip)
            for which in ("forward", "backward")
            for item in (2, 4)
        }
        for op, gates in (("lstm", 4), ("rnn", 1))
    }


def _cuda_regimes() -> dict[str, str] | None:
    if cuda.why_unavailable("cuda") is not None:
        return None
    return {which: cuda_plan.regimes(which == "backward") for which in ("forward", "backward")}


def _cpu_model() -> str:
    """The processor's name as Linux gives it, or what ``platform`` knows elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _openmp_libraries() -> list[str]:
    """File names of the OpenMP runtimes mapped into this process; empty where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {Path(line.split(maxsplit=5)[5]).name for line in maps.read_text().splitlines() if "/" in line}
    return sorted(name for name in files if name.startswith(("libgomp", "libomp", "libiomp")))
