"""The limits of this machine, measured: multiply-adds in registers, and read bandwidth by the size of what is read.

A layer's speed is given in percent of the limit that binds it. That is arithmetic, but for one sequence at a time the
bandwidth of the cache which holds the recurrent weights: each step reads all of them and uses each number once.
"""

from functools import cache

import torch

from fastseq.cli.bench.cases import Case
from fastseq.cli.timing import elapsed
from fastseq.cpu.extension import _cpu

SAMPLES = 15
SAMPLE_SECONDS = 0.01
READ_SIZES = (16 << 10, 512 << 10, 8 << 20, 256 << 20)  # bytes for each thread: of L1, L2, L3 and DRAM on most machines


def _best(work: "_Loop") -> float:
    """Units of work per second, the best of several samples: a peak is what the machine can do undisturbed."""
    repeats, seconds = 1, 0.0
    while seconds < SAMPLE_SECONDS:
        repeats *= 2
        seconds = min(elapsed(lambda: work(repeats)) for _ in range(3))  # noqa: B023
    best = min(elapsed(lambda: work(repeats)) for _ in range(SAMPLES))
    return work(repeats) / best


class _Loop:
    """One of the extension's loops with its arguments: called with a number of repeats, it returns the work done."""

    def __init__(self, name: str, storage: int, data: torch.Tensor | None, threads: int) -> None:
        self.function = getattr(_cpu, name)
        self.storage, self.data, self.threads = storage, data, threads

    def __call__(self, repeats: int) -> float:
        address, size = (0, 0) if self.data is None else (self.data.data_ptr(), self.data.nbytes)
        return float(self.function(self.storage, address, size, repeats, self.threads))


@cache
def fma_gflops(dtype: str, threads: int) -> float | None:
    """10^9 operations per second of multiply-adds in registers, "float32" or "float64"; None without the extension."""
    return None if _cpu is None else _best(_Loop("fma_loop", int(dtype == "float64"), None, threads)) / 1e9


@cache
def read_gbytes(size: int, threads: int) -> float | None:
    """10^9 bytes per second of reading ``size`` bytes again and again, the threads a share each; None without the
    extension."""
    if _cpu is None:
        return None
    data = torch.zeros(max(size, 4096 * threads), dtype=torch.uint8)
    return _best(_Loop("read_loop", 0, data.fill_(0), threads)) / 1e9


def percent(case: Case, gflop: float, seconds: float, threads: int) -> tuple[float, str] | None:
    """What part of the limit is reached, in percent, and which limit: "fma" or "read".

    With a batch of one it is the reading of the recurrent weights, once per step, and once more for BPTT; else the
    arithmetic. Half types count against float32, in which the layers compute. None without the extension.
    """
    if case.B == 1:
        limit = read_gbytes(case.recurrent_bytes(), threads)
        passes = 2 if case.mode == "training" else 1
        done, name = passes * case.layers * case.T * case.recurrent_bytes() / 1e9, "read"
    else:
        limit = fma_gflops("float64" if case.dtype == "float64" else "float32", threads)
        done, name = gflop, "fma"
    return None if limit is None else (100 * done / seconds / limit, name)


def measured(threads: int) -> dict[str, dict[str, float | None]]:
    """The limits for the results file."""
    return {
        "fma_gflops": {dtype: fma_gflops(dtype, threads) for dtype in ("float32", "float64")},
        "read_gbytes": {f"{size >> 10} KiB per thread": read_gbytes(size * threads, threads) for size in READ_SIZES},
    }
