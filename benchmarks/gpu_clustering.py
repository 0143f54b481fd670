"""The clustering operations on a GPU: fastseq with its Triton kernels forced, and the forms in use."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_clustering_loss import CASES, Case, cdist, matmul, training
from fastseq import functional as F
from fastseq.kernels.launch import INTERPRETED
from fastseq.testing import assert_matches_reference, use_implementation

GPU_CASES = (*CASES, Case(4_000_000, 64, 1000))
#: Points that the results are verified on.
VERIFIED_POINTS = 2000
#: Above this many numbers N·K there is no target in memory, and no peer that makes q.
TARGET_NUMBERS = 1e9
LANES = 128  # float32 multiply-adds of a multiprocessor in a cycle


@dataclass(frozen=True)
class Row:
    """One operation at one shape, with what is timed of it by provider, and its two floors in ms (None: not known)."""

    case: Case
    op: str
    calls: dict[str, Callable[[], object]]
    copy_ms: float | None
    arithmetic_ms: float | None


def tiny(case: Case) -> Case:
    """The same with sizes that the interpreter gets through."""
    return Case(40, 5, min(case.K, 7))


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points around centres, on the device."""
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(n, case.d, generator=generator, device=device) for n in (case.N, case.K))  # type: ignore[return-value]


def rows(case: Case, device: torch.device, implementation: str) -> Iterator[Row]:
    """The loss and both gradients, given frequencies and given a target, the assignment, and the nearest centre.

    Raises:
        AssertionError: fastseq's results are not those of the float64 reference.
    """
    z, centers = inputs(case, device)
    freq = torch.full((case.K,), case.N / case.K, device=device)
    part = {"z": z[:VERIFIED_POINTS], "centers": centers}
    for op, given in (("clustering_loss", {"freq": freq}), ("student_t_assignment", {}), ("nearest_center", {})):
        assert_matches_reference(op, part | given, implementation=implementation)

    def ours(call: Callable[..., object], *args: Any) -> Callable[[], object]:
        def run() -> object:
            with use_implementation(implementation):
                return call(*args)

        return run

    def by_freq(z: Tensor, centers: Tensor, _: Tensor) -> Tensor:
        return F.clustering_loss(z, centers, freq=freq)

    def row(op: str, calls: dict[str, Callable[[], object]], read: int, operations: int) -> Row:
        copy, arithmetic = floors(device, 4 * read, case.N * case.K * case.d * operations)
        return Row(case, op, calls, copy, arithmetic)

    small = case.N * case.K <= TARGET_NUMBERS
    leaves = z.requires_grad_(), centers.requires_grad_()
    points = 2 * z.numel()
    # A subtraction and a multiply-add for the distances, two multiply-adds and a subtraction for the gradients.
    yield row("loss and gradients, freq", {"fastseq": ours(training, by_freq, (*leaves, freq))}, points, 5)
    if small:
        with torch.no_grad():
            p = F.target_distribution(cdist_assignment(z, centers), freq)
        peers: dict[str, Callable[..., Tensor]] = {"cdist": cdist, "matmul": matmul}
        if device.type == "cuda":
            peers["matmul compiled"] = torch.compile(matmul, dynamic=False)
        inputs_of_loss = (*leaves, p)
        calls = {"fastseq": ours(training, F.clustering_loss, inputs_of_loss)}
        calls |= {name: partial(training, peer, inputs_of_loss) for name, peer in peers.items()}
        yield row("loss and gradients, target", calls, points + p.numel(), 5)
        z, centers = z.detach(), centers.detach()
        calls = {"fastseq": ours(F.student_t_assignment, z, centers), "cdist": lambda: cdist_assignment(z, centers)}
        yield row("assignment", calls, z.numel() + p.numel(), 2)
    z, centers = z.detach(), centers.detach()
    calls = {"fastseq": ours(F.nearest_center, z, centers)}
    if small:
        calls["cdist"] = lambda: torch.cdist(z, centers).min(1)
    if importlib.util.find_spec("flash_kmeans") is not None:
        calls["flash-kmeans"] = flash_kmeans(z, centers)
    yield row("nearest centre", calls, z.numel() + 2 * case.N, 2)


def cdist_assignment(z: Tensor, centers: Tensor) -> Tensor:
    """q in plain PyTorch."""
    numerator = 1 / (1 + torch.cdist(z, centers) ** 2)
    return numerator / numerator.sum(1, keepdim=True)


def flash_kmeans(z: Tensor, centers: Tensor) -> Callable[[], object]:
    """The assignment of flash-kmeans, which takes a batch of data sets."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    points, middle = z.unsqueeze(0), centers.unsqueeze(0)
    # Earlier versions want the squares of the points, and would take another third argument for them.
    squared = "x_sq" in inspect.signature(euclid_assign_triton).parameters
    more = {"x_sq": (points * points).sum(-1)} if squared else {}
    return lambda: euclid_assign_triton(points, middle, **more)


def floors(device: torch.device, moved: int, operations: int) -> tuple[float | None, float | None]:
    """ms that a GPU needs at least to move so many bytes, and to do so many operations, by its clocks."""
    if device.type != "cuda" or INTERPRETED:
        return None, None
    import triton

    facts = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    bandwidth = 2e3 * facts["mem_clock_rate"] * facts["mem_bus_width"] / 8  # bytes a second; the clocks are in kHz
    rate = 1e3 * facts["sm_clock_rate"] * facts["multiprocessor_count"] * LANES
    return 1e3 * moved / bandwidth, 1e3 * operations / rate
