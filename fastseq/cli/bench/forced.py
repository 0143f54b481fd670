"""The same cases with every library held to AVX2, as on most desktop processors.

fastseq, torch and oneDNN each read their instruction set from the environment when they load, so this needs a process
of its own.
"""

import os
from collections.abc import Sequence

from fastseq import cpu
from fastseq.cli import console
from fastseq.cli.bench import processes
from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.results import Run

ISA = "avx2"
ENVIRONMENT = {"FASTSEQ_CPU_ISA": ISA, "ATEN_CPU_CAPABILITY": ISA, "ONEDNN_MAX_CPU_ISA": ISA.upper()}


def is_forced() -> bool:
    """Whether this process runs under :data:`ENVIRONMENT`."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())


def applies(case: Case) -> bool:
    """Whether a case is measured again: the LSTM's float32 training."""
    return (case.op, case.mode, case.dtype, case.variant, case.proj_size) == ("lstm", "training", "float32", "plain", 0)


def check() -> None:
    """Called before a long run.

    Raises:
        CommandError: the kernels of that set cannot run here.
    """
    if ISA not in cpu.isas():
        raise console.CommandError(f"--avx2: this installation has no {ISA} kernels for this machine")


def run(cases: Sequence[Case], rounds: int, memory: bool) -> Run:
    """Measures the cases in a process held to that set.

    Raises:
        CommandError: it failed; it has said why.
    """
    return processes.run(cases, rounds, memory, f"--avx2: the process held to {ISA}", environment=ENVIRONMENT)
