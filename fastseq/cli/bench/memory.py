"""Peak memory of a call: how much the resident set of a fresh process grows.

Counters in torch's allocator would miss what oneDNN, the other runtimes and our own C++ workspace allocate; the process
that times has memory left over from other cases, which hides growth. So each figure comes from a process of its own, in
which the first calls of that one provider are the only work. It is forked from a server that has imported torch and
started no threads, since importing it anew would take seconds for each.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fastseq.cli.bench.cases import Case

CALLS = 2  # the second may need memory that the first still holds, such as gradients
TIMEOUT_SECONDS = 120


def peak_mib(case: Case, provider: str, threads: int) -> float | None:
    """Growth of the resident set in MiB above what layer and input take, during the first calls: results, tape,
    gradients, scratch memory and packed weights. A tiny layer has run before, so that the library's code, its threads
    and autograd's are not counted. None where the system does not tell, or the process failed."""
    return in_fresh_process(_measure, case, provider, threads)


def in_fresh_process(measure: Callable[..., float | None], *args: Any) -> float | None:
    """What ``measure(*args)``, a function of a module, gives in a process of its own that has imported torch alone.

    None where the system does not tell memory, or the process failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, measure, args), daemon=True)
    process.start()
    theirs.close()
    try:
        grown: float | None = ours.recv() if ours.poll(TIMEOUT_SECONDS) else None
    except EOFError:
        grown = None
    finally:
        ours.close()
        process.kill()
        process.join()
    return grown


def growth_mib(call: Callable[[], object]) -> float | None:
    """How far the resident set of this process rises above what it is now, in MiB, while ``CALLS`` calls run.

    None where the system does not let it be measured.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status_kib("VmRSS")
        for _ in range(CALLS):
            call()
        return max(0, _status_kib("VmHWM") - before) / 1024
    except OSError:
        return None


def _answer(answer: Connection, measure: Callable[..., float | None], args: tuple[Any, ...]) -> None:
    answer.send(measure(*args))


def _measure(case: Case, provider: str, threads: int) -> float | None:
    from fastseq.cli.bench.measure import call_of
    from fastseq.cli.bench.problem import Problem
    from fastseq.cli.bench.providers import by_name

    torch.set_num_threads(threads)
    tiny = Problem(replace(case, T=2, B=min(case.B, 2 * threads), I=16, H=64, proj_size=case.proj_size and 32))
    call_of(tiny, by_name(provider).runner(tiny))()
    problem = Problem(case)
    return growth_mib(call_of(problem, by_name(provider).runner(problem)))


def _status_kib(name: str) -> int:
    """A figure of this process as Linux gives it, in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise OSError(f"/proc/self/status has no {name}")
