"""What a step costs on a GPU before it computes anything: a grid barrier, a kernel in a graph; and the two ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from fastseq.kernels.device import arrive, wait
from fastseq.kernels.launch import INTERPRETED


@triton.jit(do_not_specialize=["steps"])
def barriers(signals, steps, SYNC: tl.constexpr, SIGNALS: tl.constexpr, INTERPRETED: tl.constexpr):
    """``steps`` barriers of all programs, as the persistent kernels have them."""
    for step in range(steps):
        arrive(signals, tl.program_id(0), step + 1, SYNC)
        wait(signals, tl.num_programs(0), step + 1, SYNC, SIGNALS, INTERPRETED)


@triton.jit
def touch(x):
    """As little as a kernel can do."""
    tl.store(x, tl.load(x) + 1)


def floors(device: torch.device, seconds: Callable[[Callable[[], object]], float]) -> Iterator[tuple[str, float, str]]:
    """``(name, value, unit)`` of each floor; ``seconds`` times a call."""
    on_gpu = device.type == "cuda"
    steps = 2000 if on_gpu else 2
    for programs in (16, 48, 96, 128) if on_gpu else (1,):
        for sync in ("counter", "flags"):
            signals = torch.zeros(max(32, 1 << (programs - 1).bit_length()), dtype=torch.int32, device=device)
            constants: dict[str, Any] = {"SYNC": sync, "SIGNALS": signals.numel(), "INTERPRETED": INTERPRETED}
            options: dict[str, Any] = {} if INTERPRETED else {"num_warps": 4, "launch_cooperative_grid": True}

            def run(
                signals: torch.Tensor = signals,
                programs: int = programs,
                constants: dict[str, Any] = constants,
                options: dict[str, Any] = options,
            ) -> None:
                signals.zero_()
                barriers[(programs,)](signals, steps, **constants, **options)

            yield f"barrier of {programs} programs, {sync}", 1e6 * seconds(run) / steps, "µs"
    if not on_gpu:
        return
    x = torch.zeros(1, device=device)
    touch[(1,)](x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            touch[(1,)](x)
    yield "a kernel in a graph", 1e3 * seconds(graph.replay), "µs"
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    yield "device copy, read and written", 2e-12 * 4 * source.numel() / seconds(lambda: target.copy_(source)), "TB/s"
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield "bfloat16 product of 8192³", 2e-12 * 8192**3 / seconds(lambda: torch.mm(a, b)), "TFLOP/s"
