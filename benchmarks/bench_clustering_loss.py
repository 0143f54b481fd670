"""The clustering loss with both gradients against its peers: ``python -m benchmarks.bench_clustering_loss``.

Each provider is checked against the float64 reference before it is timed. The peers are those in use: pt-dec's
broadcast form, ``torch.cdist``, and the expanded square in eager mode and compiled. The committed figures come from
``--json benchmarks/results/clustering.json``, in one run or case by case. Memory is what the resident set of a fresh
process grows by, less the gradients themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastseq import functional as F
from fastseq.cli.bench import memory
from fastseq.cli.bench.results import differing, environment
from fastseq.cli.timing import interleaved, quantiles

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BASELINES = ("cdist", "matmul", "matmul compiled")  # the best of these is the bar


@dataclass(frozen=True)
class Case:
    """N points, d features, K centres."""

    N: int
    d: int
    K: int

    def __str__(self) -> str:
        return f"({self.N}, {self.d}, {self.K})"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points and centres that want gradients, and the target of their own assignment."""
        generator = torch.Generator().manual_seed(0)
        z, centers = (torch.randn(n, self.d, generator=generator) for n in (self.N, self.K))
        target = F.target_distribution(F.student_t_assignment(z, centers))
        return z.requires_grad_(), centers.requires_grad_(), target


CASES = (Case(70_000, 10, 10), Case(10_000, 10, 4), Case(200_000, 32, 256))
# How often faster than the best of BASELINES the loss with a target has to be, and should be.
GOALS = {CASES[0]: (4, 9), CASES[1]: (3, 6), CASES[2]: (4, 8)}


def broadcast(z: Tensor, centers: Tensor, target: Tensor) -> Tensor:
    """As pt-dec and ClustPy write it: N·K·d numbers."""
    numerator = 1 / (1 + ((z.unsqueeze(1) - centers) ** 2).sum(2))
    q = numerator / numerator.sum(1, keepdim=True)
    return torch.nn.functional.kl_div(q.log(), target, reduction="sum")


def cdist(z: Tensor, centers: Tensor, target: Tensor) -> Tensor:
    """N·K numbers, some of them several times."""
    numerator = 1 / (1 + torch.cdist(z, centers) ** 2)
    q = numerator / numerator.sum(1, keepdim=True)
    return torch.nn.functional.kl_div(q.log(), target, reduction="sum")


def matmul(z: Tensor, centers: Tensor, target: Tensor) -> Tensor:
    """The expanded square: the fastest in plain PyTorch, and inexact far from the origin."""
    distance = (z * z).sum(1, keepdim=True) - 2 * z @ centers.T + (centers * centers).sum(1)
    numerator = 1 / (1 + distance.clamp_min(0))
    q = numerator / numerator.sum(1, keepdim=True)
    return torch.nn.functional.kl_div(q.log(), target, reduction="sum")


def providers(case: Case, freq: Tensor | None = None) -> dict[str, Loss]:
    """By name; the frequencies of ``fastseq, freq`` are, unless given, those that the target was made of."""
    if freq is None:
        z, centers, _ = case.inputs()
        freq = F.accumulate_frequencies([z], centers).float()
    found: dict[str, Loss] = {
        "fastseq": F.clustering_loss,
        "fastseq, freq": lambda z, centers, _: F.clustering_loss(z, centers, freq=freq),
        "cdist": cdist,
        "matmul": matmul,
        "matmul compiled": torch.compile(matmul, dynamic=False),
    }
    if case.N * case.K * case.d < 1e8:  # else it would not fit in memory
        found["broadcast"] = broadcast
    return found


def training(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients."""
    value = loss(*inputs)
    dz, dcenters = torch.autograd.grad(value, inputs[:2])
    return value.detach(), dz, dcenters


def check(case: Case) -> None:
    """Every provider gives what F.clustering_loss gives, to what the expanded square leaves of float32.

    Raises:
        AssertionError: it does not.
    """
    inputs = case.inputs()
    by_name = providers(case)
    z, centers, target = (value.detach().double() for value in inputs)
    truth = training(F.clustering_loss, (z.requires_grad_(), centers.requires_grad_(), target))
    for name, loss in by_name.items():
        for got, expected in zip(training(loss, inputs), truth, strict=True):
            if not torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-4):
                raise AssertionError(f"{case}: {name} is wrong")


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds per loss and both gradients of each provider, interleaved; one list entry per round."""
    inputs = case.inputs()
    calls = {name: partial(training, loss, inputs) for name, loss in providers(case).items()}
    return interleaved(calls, rounds)


def extra_mib(case: Case, name: str) -> float | None:
    """Memory that loss and gradients take beside inputs and gradients, in MiB, in a process of its own.

    None where the system does not tell; and for what is compiled, since the compiler's own memory cannot be told apart.
    """
    if name.endswith("compiled"):
        return None
    grown = memory.in_fresh_process(_growth, case, name, torch.get_num_threads())
    return None if grown is None else max(0.0, grown - 4 * case.d * (case.N + case.K) / 2**20)


def _growth(case: Case, name: str, threads: int) -> float | None:
    torch.set_num_threads(threads)
    tiny = Case(64 * threads, case.d, 4)
    training(providers(tiny)[name], tiny.inputs())  # the library's code, its threads and autograd's
    # Not by case.inputs(), whose scratch memory the loss could take over and seem to need none.
    z, centers = (torch.randn(n, case.d).requires_grad_() for n in (case.N, case.K))
    inputs = z, centers, torch.rand(case.N, case.K).softmax(-1)
    loss = providers(case, torch.full((case.K,), case.N / case.K))[name]
    return memory.growth_mib(partial(training, loss, inputs))


def kept(old: dict[str, Any] | None, environment: dict[str, Any], chosen: Sequence[Case]) -> list[dict[str, Any]]:
    """The cases of ``old`` that are not to be measured again.

    Raises:
        ValueError: they were measured elsewhere, or with another version.
    """
    if old is None:
        return []
    again = set(map(str, chosen))
    stay = [each for each in old["cases"] if each["case"] not in again]
    if stay and (apart := differing(old["environment"], environment)):
        raise ValueError(f"the file's other cases do not belong with these: {', '.join(apart)} differ")
    return stay


def main() -> None:
    """Measures, prints a line per provider, and with ``--json`` adds the figures to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", metavar="N,d,K", help="one of the cases (default: all)")
    parser.add_argument("--json", type=Path, help="a file of figures: the cases that it has already stay in it")
    args = parser.parse_args()
    chosen = [case for case in CASES if args.case in (None, f"{case.N},{case.d},{case.K}")]
    if not chosen:
        parser.error(f"--case: expected one of {', '.join(map(str, CASES))}, got {args.case}")
    old = json.loads(args.json.read_text(encoding="utf-8")) if args.json is not None and args.json.exists() else None
    here = environment()
    try:
        results = kept(old, here, chosen)
    except ValueError as error:
        parser.error(f"--json: {error}")
    for case in chosen:
        check(case)
        samples = measure(case, args.rounds)
        best = min((name for name in BASELINES), key=lambda name: quantiles(samples[name]).median)
        print(f"{case}, {torch.get_num_threads()} threads; ratios to {best}")
        figures = {}
        for name, seconds in samples.items():
            ratio = quantiles([bar / mine for bar, mine in zip(samples[best], seconds, strict=True)])
            time = quantiles([1e3 * value for value in seconds])
            print(f"  {name:18} {time.median:9.3f} ms  ({time.p20:.3f} to {time.p80:.3f})  {ratio.median:6.2f}x")
            figures[name] = {"ms": asdict(time), "ratio": asdict(ratio), "extra_mib": extra_mib(case, name)}
        results.append({"case": str(case), "rounds": args.rounds, "best": best, "figures": figures})
    if args.json is not None:
        results.sort(key=lambda each: list(map(str, CASES)).index(each["case"]))
        found = {"environment": here, "cases": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
