"""``python -m benchmarks.cuda_sanitized``: every CUDA kernel once at small sizes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from fastseq import functional as F
from fastseq.cuda import plan
from fastseq.cuda.extension import extension
from fastseq.testing import use_implementation


def run(device: str, op: str, dtype: torch.dtype, steps: int, batch: int, hidden: int, flags: bool) -> None:
    """A forward and a backward."""

    def random(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, device=device) / 8).to(dtype).requires_grad_()

    gates = 4 if op == "lstm" else 1
    states = [random(batch, hidden) for _ in range(2 if op == "lstm" else 1)]
    args = random(steps, batch, 16), *states, random(gates * hidden, 16), random(gates * hidden, hidden)
    reset = torch.rand(steps, batch, device=device) < 0.3 if flags else None
    y = getattr(F, op)(*args, reset=reset)[0]
    torch.autograd.grad(y.sum(), args)


def main(device: str = "cuda") -> None:
    """All builds of the cluster and of the grid, and the cells. In a test the device is the CPU, by the emulator."""
    with use_implementation("cuda"):
        for build, *_ in extension().cluster_builds(72, False):
            for flags in (False, True):
                with plan.override(regime="cluster", build=build):
                    run(device, "lstm", torch.float16, 6, 19, 72, flags)
        for groups, *_ in extension().grid_builds(19, 72, False):
            for flags in (False, True):
                with plan.override(regime="grid", build=groups):
                    run(device, "lstm", torch.float16, 6, 19, 72, flags)
        with plan.override(regime="cell"):
            for op in ("lstm", "rnn"):
                for hidden in (63, 64):
                    run(device, op, torch.float32, 2, 5, hidden, True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
