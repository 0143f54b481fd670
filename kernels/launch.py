"""Starting a kernel: the arguments once, for a GPU, for the interpreter and for compiling ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastseq.kernels.plan import H100, Chip, Plan
from fastseq.ops.tape import padded

#: Whether this process interprets kernels (TRITON_INTERPRET=1 when triton was imported) instead of compiling them.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Grid:
    """The plan of a launch whose programs know nothing of one another: how many along each axis, and their warps."""

    grid: tuple[int, ...]
    warps: int = 4
    stages: int = 1
    cooperative: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch by a plan: ``arguments`` are tensors (None: absent) and numbers that a kernel is not compiled for,
    ``constants`` those it is compiled for."""

    kernel: Any
    plan: Plan | Grid
    arguments: Mapping[str, Tensor | int | float | None]
    constants: dict[str, Any]

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        options: dict[str, Any] = {}
        if not INTERPRETED:
            options = compile_options(self, torch.version.hip is not None)
        self.kernel[self.plan.grid](**self.arguments, **self.constants, **options)


def compile_options(launch: Launch, hip: bool) -> dict[str, Any]:
    """What a compiled launch is told besides its constants."""
    options: dict[str, Any] = {
        "num_warps": launch.plan.warps,
        "num_stages": launch.plan.stages,
        "launch_cooperative_grid": launch.plan.cooperative,
    }
    if not hip:
        # A program has a multiprocessor to itself. Left alone, ptxas saves registers for a second one, and spills.
        options["maxnreg"] = min(255, 65536 // (32 * launch.plan.warps))
    return options


def tile_constants(plan: Plan) -> dict[str, Any]:
    """The constants of every kernel that cuts the recurrent product by a plan."""
    return {
        "BB": plan.BB,
        "BH": plan.BH,
        "W": plan.warps,
        "KC": plan.cut.KC,
        "FULL": plan.cut.full,
        "LAST": plan.cut.last,
        "HELD": plan.cut.held,
        "REGISTERS": plan.cut.registers,
        "DEPTH": plan.depth,
        "SYNC": plan.sync,
        "SIGNALS": signals_per_group(plan),
        "PRECISION": plan.precision,
        "INTERPRETED": INTERPRETED,
    }


def resident_constants(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of every resident kernel. ``WIDTH`` is how many numbers of a tile a warp has side by side, where
    each thread takes what one load of 16 bytes brings, or less of a tile that has less."""
    each = max(1, min(16 // dtype.itemsize, plan.BB * plan.BH // (32 * plan.warps)))
    return {
        "BB": plan.BB,
        "BH": plan.BH,
        "WIDTH": max(plan.BH, 32 * each),
        "PREFETCH": plan.depth > 0,
        "PRECISION": plan.precision,
    }


def signals_per_group(plan: Plan) -> int:
    """Numbers of a group, a cache line at least, so that groups do not disturb each other."""
    return max(32, 1 << (plan.programs - 1).bit_length())


def new_signals(plan: Plan, device: torch.device) -> Tensor | None:
    """The signals of a persistent launch, at zero. A call has its own, so calls on several streams do not meet."""
    if plan.regime != "persistent":
        return None
    return torch.zeros(plan.groups * signals_per_group(plan), dtype=torch.int32, device=device)


def new_exchange(h0: Tensor, h_mask: Tensor | None) -> Tensor:
    """``[2, B, Hp]``: h, times ``h_mask``, as the recurrent product of a step reads it and, by turns, that of the next.
    Place 1 holds what the first step reads. Rows are whole loads, whatever H is; zeros stand beyond it."""
    batch, hidden = h0.shape
    exchange = h0.new_zeros((2, batch, padded(hidden)))
    exchange[1, :, :hidden] = h0 if h_mask is None else h0 * h_mask
    return exchange


def whole_loads(numbers: int, dtype: torch.dtype) -> int:
    """``numbers`` rounded up to what loads of 16 bytes bring."""
    each = 16 // dtype.itemsize
    return -(-numbers // each) * each


def ranges(plan: Plan, steps: int, backward: bool) -> Iterator[tuple[int, int]]:
    """``(begin, count)`` of each launch, in the order of the launches: all steps at once, or one each."""
    if plan.regime != "step":
        yield 0, steps
        return
    for step in reversed(range(steps)) if backward else range(steps):
        yield step, 1


@cache
def _chip(index: int) -> Chip:
    facts = triton.runtime.driver.active.utils.get_device_properties(index)
    capability = 0 if torch.version.hip else torch.cuda.get_device_capability(index)[0]
    return Chip(facts["multiprocessor_count"], facts["max_shared_mem"], capability)


def chip_of(device: torch.device) -> Chip:
    """What a plan has to know of a device. The interpreter runs programs one after the other, so there one is all that
    may wait for each other."""
    return _chip(device.index) if device.type == "cuda" else replace(H100, programs=1)


@contextlib.contextmanager
def kernel_context(x: Tensor) -> Iterator[None]:
    """On the device of x, below autograd and autocast: the launchers call torch's products, which must not record a
    graph or change a dtype."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        if torch.is_autocast_enabled(x.device.type):
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if x.device.type == "cuda":
            stack.enter_context(torch.cuda.device(x.device))
        yield


def expect(tensors: Iterable[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]], device: torch.device) -> None:
    """Checks ``(name, tensor or None, shape, dtype)`` rows, since ``torch.ops`` can be called past the public checks.

    Raises:
        ValueError: a tensor has another shape, dtype or device than the kernel assumes.
    """
    for name, tensor, shape, dtype in tensors:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
            got = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: the kernel expects {list(shape)} {dtype} on {device}, got {got}")
