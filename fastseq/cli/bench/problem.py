"""One case made concrete: the layer, its input and what arrives at its output; and the check that precedes timing."""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastseq.cli.bench.cases import MEAN_LENGTH, OPTION_VARIANTS, RESET_PROBABILITY, Case

CHECKED_ROWS = 4  # sequences of the batch whose results are held against the float64 reference


class Runner(Protocol):
    """One provider's form of a problem: what is checked, and then timed."""

    def forward(self, input: Tensor) -> Tensor:
        """The output [T, B, P] for an input [T, B, I], without gradient."""

    def training(self, grad_output: Tensor) -> list[Tensor]:
        """The output, and the gradients of the problem's input and of all weights in the order of ``nn.LSTM``."""

    def step(self) -> list[Tensor]:
        """One time step of the problem's input and state: the output, then the new state, each [B, ·]."""


class Mismatch(Exception):
    """Results disagree, so that there is nothing to time."""


class Problem:
    """Layer, input, state and arriving gradient of a case, the same numbers on every machine and for every provider."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer: nn.RNNBase
            if case.op == "lstm":
                self.layer = nn.LSTM(case.I, case.H, case.layers, proj_size=case.proj_size, dtype=self.dtype)
            else:
                self.layer = nn.RNN(case.I, case.H, case.layers, nonlinearity=case.nonlinearity, dtype=self.dtype)
        self.layer.requires_grad_(case.mode == "training")

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        T, B = case.T, case.B
        self.input = draw(T, B, case.I)
        self.grad_output = draw(T, B, case.P).to(self.output_dtype)
        self.state = tuple(
            draw(case.layers, B, width) for width in ((case.P, case.H) if case.op == "lstm" else (case.H,))
        )
        self.lengths: Tensor | None = None
        if case.variant in ("lengths", "packed"):
            # Evenly spread, so that their mean is what the case says, and in any order.
            shortest = max(1, round((2 * MEAN_LENGTH - 1) * T))
            spread = torch.linspace(shortest, T, B).round().long()
            self.lengths = spread[torch.randperm(B, generator=generator)]
        self.reset: Tensor | None = None
        if case.variant in ("reset", "reset_state"):
            self.reset = torch.rand(T, B, generator=generator) < RESET_PROBABILITY
        self.options = self._options(generator) if case.variant in OPTION_VARIANTS else None

    def _options(self, generator: torch.Generator) -> dict[str, Any]:
        """What ``fastseq.functional.lstm`` takes beyond the plain layer."""
        case = self.case

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        def weights(*shape: int) -> Tensor:
            return ((2 * uniform(*shape) - 1) / math.sqrt(case.H)).to(self.dtype)

        T, B, H = case.T, case.B, case.H
        made: dict[str, Any]
        if case.variant == "reset_state":
            made = {"reset": self.reset, "reset_state": (weights(B, H), weights(B, H))}
        elif case.variant == "recurrent_dropout":
            made = {"h_mask": (uniform(B, H) < 0.7).to(self.dtype) / 0.7}
        elif case.variant == "zoneout":
            made = {name: uniform(T, B, H) < 0.1 for name in ("zoneout_h", "zoneout_c")}
        elif case.variant == "peephole":
            made = {"peephole": weights(3, H)}
        elif case.variant == "layer_norm":
            names = (f"{kind}_ln_{of}" for kind in ("weight", "bias") for of in ("gates", "c"))
            made = {name: weights(4 * H if name.endswith("gates") else H) for name in names}
        else:
            made = {case.variant: 1.5 if case.variant == "cell_clip" else 1.0}
        return made

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return torch.bfloat16 if self.case.variant == "autocast" else self.dtype

    @property
    def gflop(self) -> float:
        """Arithmetic of one call, padding left out."""
        return self.case.gflop(None if self.lengths is None else int(self.lengths.sum()))

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """Autocast where the case asks for it."""
        if self.case.variant == "autocast":
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()

    def rows(self) -> list[int]:
        """The sequences whose results are checked: the first, the last, and some between."""
        last = self.case.B - 1
        return sorted({round(last * i / max(1, CHECKED_ROWS - 1)) for i in range(CHECKED_ROWS)})

    def of_rows(self, result: Tensor) -> Tensor:
        """What of a result belongs to the checked sequences: all of it, if it is a weight's gradient."""
        if result.dim() == 3:  # [T, B, ·]
            return result[:, self.rows()]
        return result[self.rows()] if self.case.mode == "step" else result

    def part(self, dtype: torch.dtype) -> "Problem":
        """The problem with the checked sequences alone, its numbers in ``dtype`` and without autocast."""
        rows = self.rows()
        small = copy.copy(self)
        plain = "plain" if self.case.variant == "autocast" else self.case.variant
        small.case = replace(self.case, B=len(rows), variant=plain)
        small.dtype = dtype
        small.layer = copy.deepcopy(self.layer).to(dtype)
        small.input = self.input[:, rows].to(dtype)
        small.grad_output = self.grad_output[:, rows].to(dtype)
        small.state = tuple(tensor[:, rows].to(dtype) for tensor in self.state)
        small.lengths = None if self.lengths is None else self.lengths[rows]
        small.reset = None if self.reset is None else self.reset[:, rows]
        small.options = None if self.options is None else {n: self._part(v, dtype) for n, v in self.options.items()}
        return small

    def _part(self, value: Any, dtype: torch.dtype) -> Any:
        """An option of the checked sequences: their rows of what has a batch, in ``dtype``; the rest as it is."""
        if isinstance(value, tuple):
            return tuple(self._part(each, dtype) for each in value)
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():  # [T, B] or [T, B, ·]
            return value[:, self.rows()]
        return (value if self.case.variant in ("peephole", "layer_norm") else value[self.rows()]).to(dtype)

    def masked_grad_output(self) -> Tensor:
        """The arriving gradient, zero but for the checked sequences: only they then contribute to the weights'."""
        masked = torch.zeros_like(self.grad_output)
        rows = self.rows()
        masked[:, rows] = self.grad_output[:, rows]
        return masked

    def names(self) -> list[str]:
        """What :meth:`Runner.training` returns, by name."""
        return [
            "output",
            "gradient of the input",
            *(f"gradient of {name}" for name, _ in self.layer.named_parameters()),
        ]


def results(runner: Runner, problem: Problem, grad_output: Tensor) -> dict[str, Tensor]:
    """Everything a runner computes in the problem's mode, by name."""
    case = problem.case
    if case.mode == "training":
        return dict(zip(problem.names(), runner.training(grad_output), strict=True))
    if case.mode == "step":
        return dict(zip(("output", "h", "c") if case.op == "lstm" else ("output", "h"), runner.step(), strict=True))
    return {"output": runner.forward(problem.input)}


def sanity_bound(dtype: torch.dtype) -> float:
    """How far a foreign library may be off, relative to the largest number of a tensor: the square root of the dtype's
    epsilon. Rounding stays far below it; a gate out of order, a missing bias or a wrong gradient does not."""
    return float(torch.finfo(dtype).eps ** 0.5)


def verify(problem: Problem, runners: Mapping[str, Runner], reference: Callable[[Problem], Runner]) -> None:
    """Holds every runner's results against the reference in float64, before anything is timed.

    The reference is a loop in Python, so it runs a few sequences of the batch alone; the runners run the whole problem,
    with a gradient arriving at those sequences only, so that the weights' gradients must agree as they are. What
    fastseq makes of every sequence is then held against ``torch.nn``.

    Args:
        problem: what was run.
        runners: by name, "torch" among them. "fastseq" is judged by the tolerance rule of :mod:`fastseq.testing` with
            ``torch.nn``'s error as the yardstick; the others by :func:`sanity_bound`, since that rule is about this
            library's kernels.
        reference: makes the runner of the problem's few sequences in float64.

    Raises:
        Mismatch: naming the first tensor that is further off than allowed.
    """
    from fastseq import testing

    part = problem.part(torch.float64)
    with testing.use_implementation("reference"):
        truths = results(reference(part), part, part.grad_output)
    found = {name: results(runner, problem, problem.masked_grad_output()) for name, runner in runners.items()}
    bound = sanity_bound(problem.output_dtype)
    for library, tensors in found.items():
        for name, whole in tensors.items():
            got, truth = problem.of_rows(whole), truths[name]
            if library == "fastseq":
                judged = testing.compare_tensor(name, got, problem.of_rows(found["torch"][name]), truth)
                ok, error, allowed = judged.ok, judged.error, judged.allowed
            else:
                error, allowed = _distance(got, truth), bound * truth.abs().max().item()
                ok = error <= allowed
            if not ok:
                raise Mismatch(f"{problem.case.key}: {library}: {name}: error {error:.2e}, allowed {allowed:.2e}")
    if "fastseq" in found:
        expected = found["torch"]["output"]
        error, allowed = _distance(found["fastseq"]["output"], expected), bound * expected.abs().max().item()
        if not error <= allowed:
            raise Mismatch(f"{problem.case.key}: output, all sequences: error {error:.2e}, allowed {allowed:.2e}")


def _distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where shapes differ."""
    return float("inf") if got.shape != expected.shape else (got.double() - expected.double()).abs().max().item()
