"""Who is timed side by side, fastseq last."""

from typing import Protocol

from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.layers import Compiled, Fastseq, Plain, TorchNN
from fastseq.cli.bench.problem import Problem, Runner
from fastseq.cli.bench.runtimes import OnnxRuntime, OpenVino


class Provider(Protocol):
    """A library that can run some of the cases."""

    name: str
    pool: str  # whose threads it computes with

    def why_not(self, case: Case) -> str | None:
        """The reason why it does not serve the case, or None."""

    def runner(self, problem: Problem) -> Runner:
        """The problem in this library's form, ready to be checked and timed."""


PROVIDERS: tuple[Provider, ...] = (TorchNN(), Compiled(), OnnxRuntime(), OpenVino(), Plain(), Fastseq())


def by_name(name: str) -> Provider:
    """The provider called ``name``."""
    return next(provider for provider in PROVIDERS if provider.name == name)
