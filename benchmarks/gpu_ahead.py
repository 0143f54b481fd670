"""``python -m benchmarks.gpu_ahead 0/8``: compiles what ``make gpu`` will measure, into Triton's cache on disk.

A kernel takes seconds to compile and the benchmark has some two hundred: one after the other they would take most of
its time. So processes take a share each, while the package is built and tested. Layers are called as in the benchmark,
on this GPU and with two steps, and nothing that they would launch is launched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import VARIANTS, varied
from benchmarks.gpu_cases import CASES, KINDS, Case, Pair
from fastseq.kernels import plan
from fastseq.kernels.launch import Launch, compile_options

Job = tuple[Case, str, dict[str, Any]]


def jobs() -> Iterator[Job]:
    """Layer, kind of numbers and what is asked of its plans, in the order in which the benchmark comes to them."""
    for kinds in (("float16", "bfloat16"), ("float32", "tf32")):
        for case in CASES:
            for kind in kinds:
                yield replace(case, T=2), kind, {}
        if kinds[0] == "float16":
            for case in varied(CASES):
                for fields in VARIANTS:
                    yield replace(case, T=2), "float16", fields
    assert set(KINDS) == {"float16", "bfloat16", "float32", "tf32"}


def compile_launch(launch: Launch) -> None:
    """What :meth:`Launch.run` does, up to the launch."""
    options = compile_options(launch, torch.version.hip is not None)
    launch.kernel.warmup(grid=launch.plan.grid, **launch.arguments, **launch.constants, **options)


def compile_job(job: Job, device: torch.device) -> None:
    """All kernels of forward and training."""
    case, kind, fields = job
    pair = Pair(case, kind, device)
    pair.precise()
    with mock.patch.object(Launch, "run", compile_launch), plan.override(**fields) if fields else nullcontext():
        pair.forward(pair.by_fastseq)
        pair.training(pair.by_fastseq, pair.ours)


def main() -> int:
    """Compiles one share; what does not compile is the benchmark's to tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ahead", description=__doc__.partition("\n\n")[0])
    parser.add_argument("share", help="I/N: of N shares that of number I, from 0")
    number, shares = map(int, parser.parse_args().share.split("/"))
    for job in [*jobs()][number::shares]:
        try:
            compile_job(job, torch.device("cuda:0"))
        except Exception as error:  # a variant may not fit; the others are wanted all the same
            print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
