"""The CUDA C++ kernels of an LSTM beside cuDNN and Triton, in µs of a step, and the barrier that is its floor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from benchmarks.gpu_cases import KINDS, MODES, Case, Pair
from fastseq.cuda import plan
from fastseq.cuda.extension import extension

Call = Callable[[], object]


def barriers(device: torch.device, seconds: Callable[[Call], float]) -> Iterator[tuple[str, float, str]]:
    """``(name, value, unit)`` of the barrier of a cluster, by its size; ``seconds`` times a call."""
    steps, threads = (10000, 256) if device.type == "cuda" else (2, 64)
    for blocks in (8, 16):
        value = seconds(functools.partial(extension().cluster_barriers, blocks, 1, threads, steps, 0))
        yield f"barrier of a cluster of {blocks} blocks", 1e6 * value / steps, "µs"


def layers(
    device: torch.device, cases: Iterable[Case], medians: Callable[[Mapping[str, Call]], Mapping[str, float]]
) -> Iterator[tuple[str, float, str]]:
    """``(name, value, unit)`` of forward and training of each case in half types, each verified first; ``medians``
    times calls by name, interleaved."""
    for case in cases:
        if case.op != "lstm" or case.time == "lengths" or case.layers > 1 or case.bidirectional:
            continue
        for kind in ("float16", "bfloat16"):
            ours, peer = (Pair(case, kind, device, name) for name in ("cuda", "triton"))
            ours.verify()
            for mode in MODES:
                pair = ours.calls(mode)
                calls = {"cuDNN": pair["torch"], "CUDA C++": pair["fastseq"], "Triton": peer.calls(mode)["fastseq"]}
                found = medians(calls)
                shape = case.T, case.B, case.H, KINDS[kind], device
                regime = plan.choose(*shape, mode == "training", case.time == "reset").regime
                for name, value in found.items():
                    what = f"{name}, {regime}" if name == "CUDA C++" else name
                    yield f"{case.name} {kind} {mode}, {what}", 1e6 * value / case.T, "µs a step"
