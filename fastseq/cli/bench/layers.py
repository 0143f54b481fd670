"""Providers that are PyTorch layers: torch.nn, fastseq, and torch.compile of the reference."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.cli.bench.cases import COSTED_VARIANTS, OPTION_VARIANTS, Case
from fastseq.cli.bench.problem import Problem, Runner

MOST_COMPILED_STEPS = 64  # torch.compile unrolls the loop over time, and compiles for a second or more per ten steps


class LayerRunner:
    """A module called as ``nn.LSTM`` and ``nn.RNN`` are."""

    def __init__(self, problem: Problem, layer: nn.Module) -> None:
        self.problem = problem
        self.layer = layer
        self.parameters = list(layer.parameters())

    def output(self, input: Tensor) -> Tensor:
        """The output [T, B, P]."""
        result: Tensor = self.layer(input)[0]
        return result

    def forward(self, input: Tensor) -> Tensor:
        """Without gradient."""
        with torch.no_grad(), self.problem.precision():
            return self.output(input)

    def training(self, grad_output: Tensor) -> list[Tensor]:
        """Forward and BPTT."""
        input = self.problem.input.detach().requires_grad_()
        with self.problem.precision():
            output = self.output(input)
        return [output.detach(), *torch.autograd.grad(output, [input, *self.parameters], grad_output)]

    def step(self) -> list[Tensor]:
        """One step as ``torch.nn`` takes it: a sequence of length 1."""
        state = self.problem.state
        with torch.no_grad():
            output, after = self.layer(self.problem.input, state if len(state) == 2 else state[0])
        return [output[0], *(tensor[-1] for tensor in (after if isinstance(after, tuple) else (after,)))]


class PackingRunner(LayerRunner):
    """Uneven lengths in the one way that ``torch.nn`` knows: pack the padded batch, and pad the result."""

    def output(self, input: Tensor) -> Tensor:
        """The output, zero past the end of each sequence."""
        assert self.problem.lengths is not None
        packed = pack_padded_sequence(input, self.problem.lengths, enforce_sorted=False)
        result: Tensor = pad_packed_sequence(self.layer(packed)[0], total_length=input.shape[0])[0]
        return result


class LoopRunner(LayerRunner):
    """Resets with ``torch.nn``: the layer called step by step, the state masked before each."""

    def output(self, input: Tensor) -> Tensor:
        """The outputs of the steps, stacked."""
        assert self.problem.reset is not None
        keep = (~self.problem.reset).to(input.dtype)[:, None, :, None]  # [T, 1, B, 1]
        state: tuple[Tensor, Tensor] | None = None
        outputs = []
        for t in range(input.shape[0]):
            if state is not None:
                state = (state[0] * keep[t], state[1] * keep[t])
            output, state = self.layer(input[t : t + 1], state)
            outputs.append(output)
        return torch.cat(outputs)


class FastseqRunner(LayerRunner):
    """fastseq's layer, which takes ``lengths`` and ``reset`` as they are."""

    def output(self, input: Tensor) -> Tensor:
        """The output, zero past the end of each sequence."""
        problem = self.problem
        result: Tensor
        if problem.lengths is not None:
            result = self.layer(input, lengths=problem.lengths)[0]
        elif problem.reset is not None:
            result = self.layer(input, reset=problem.reset)[0]
        else:
            result = self.layer(input)[0]
        return result


class OptionRunner(LayerRunner):
    """One LSTM layer with the problem's options, by ``fastseq.functional.lstm`` or by the loop of the reference."""

    def __init__(self, problem: Problem, layer: nn.Module, loop: bool = False, plain: bool = False) -> None:
        super().__init__(problem, layer)
        from fastseq import functional, reference

        self.function = reference.lstm if loop else functional.lstm
        self.options = {} if plain else problem.options

    def output(self, input: Tensor) -> Tensor:
        """The output, from zero states."""
        assert self.options is not None
        zeros = input.new_zeros(input.shape[1], self.problem.case.H)
        return self.function(input, zeros, zeros, *self.parameters, **self.options)[0]


class StepRunner(FastseqRunner):
    """fastseq's streaming step, which keeps its packed weights from call to call."""

    def __init__(self, problem: Problem, layer: nn.Module) -> None:
        super().__init__(problem, layer)
        self.x_t = problem.input[0]

    def step(self) -> list[Tensor]:
        """One step: x_t [B, I] and the state in, y_t and the state out."""
        with torch.no_grad():
            output, after = self.layer.step(self.x_t, self.problem.state)  # type: ignore[operator]
        return [output, *(tensor[-1] for tensor in after)]


class TorchNN:
    """``torch.nn``, run eagerly."""

    name = "torch"
    pool = "openmp"

    def why_not(self, case: Case) -> str | None:
        """Serves every case."""
        return None

    def runner(self, problem: Problem) -> Runner:
        """The layer itself, or the loop or the packing around it that the case takes with ``torch.nn``."""
        if problem.options is not None:
            return OptionRunner(problem, problem.layer, loop=True)
        kinds = {"lengths": PackingRunner, "packed": PackingRunner, "reset": LoopRunner}
        return kinds.get(problem.case.variant, LayerRunner)(problem, problem.layer)


class Fastseq:
    """This library."""

    name = "fastseq"
    pool = "openmp"

    def why_not(self, case: Case) -> str | None:
        """The reason why it cannot serve the case, or None."""
        import fastseq

        if case.mode == "step" and not hasattr(fastseq.LSTM if case.op == "lstm" else fastseq.RNN, "step"):
            return f"fastseq.{case.op.upper()} has no method `step` yet"
        return None

    def runner(self, problem: Problem) -> Runner:
        """The converted layer."""
        if problem.options is not None:
            return OptionRunner(problem, problem.layer)
        layer = converted(problem)
        if problem.case.mode == "step" and hasattr(layer, "step"):
            return StepRunner(problem, layer)
        return (PackingRunner if problem.case.variant == "packed" else FastseqRunner)(problem, layer)


class Plain:
    """fastseq without the option that the case is about: the difference is what the option costs."""

    name = "plain"
    pool = "openmp"

    def why_not(self, case: Case) -> str | None:
        """The reason why it has no part in the case, or None."""
        return None if case.variant in COSTED_VARIANTS else "no option whose cost it would show"

    def runner(self, problem: Problem) -> Runner:
        """The plain layer."""
        if problem.case.variant in OPTION_VARIANTS:
            return OptionRunner(problem, problem.layer, plain=True)
        layer: Any = converted(problem)
        layer.recompute = False
        return LayerRunner(problem, layer)


class Compiled:
    """``torch.compile`` of the reference, a loop over time in Python; it compiles for long, so it must be asked for."""

    name = "compile"
    pool = "openmp"

    def why_not(self, case: Case) -> str | None:
        """The reason why it cannot serve the case, or None."""
        if case.mode not in ("forward", "training") or case.variant != "plain":
            return "only plain forward and training are compiled"
        if case.T * case.layers > MOST_COMPILED_STEPS:
            return f"more than {MOST_COMPILED_STEPS} steps to unroll and compile"
        return None

    def runner(self, problem: Problem) -> Runner:
        """The layer, compiled when it is first called."""
        torch._dynamo.reset()
        return LayerRunner(problem, ReferenceLayer(problem.layer))


class ReferenceLayer(nn.Module):
    """The layer of ``torch.nn`` by compiled calls of :mod:`fastseq.reference`."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        from fastseq import reference

        self.layer = copy.deepcopy(layer)
        self.is_lstm = isinstance(layer, nn.LSTM)
        self.compiled = torch.compile(reference.lstm if self.is_lstm else reference.rnn, fullgraph=True, dynamic=False)
        self.options = {} if self.is_lstm else {"nonlinearity": layer.nonlinearity}

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        """The output of the last layer, from zero states."""
        size = self.layer.hidden_size
        for weights in self.layer.all_weights:
            h = input.new_zeros(input.shape[1], self.layer.proj_size or size)
            states = (h, input.new_zeros(input.shape[1], size)) if self.is_lstm else (h,)
            options = self.options | ({"w_hr": weights[4]} if self.layer.proj_size else {})
            input = self.compiled(input, *states, *weights[:4], **options)[0]
        return input, None


def converted(problem: Problem) -> nn.Module:
    """fastseq's layer with a copy of the problem's weights."""
    import fastseq

    layer: nn.Module = fastseq.convert(copy.deepcopy(problem.layer))
    recurrent: Any = layer
    recurrent.recompute = problem.case.variant == "recompute"
    return layer


def reference_runner(problem: Problem) -> Runner:
    """What :func:`fastseq.cli.bench.problem.verify` runs under the reference implementation."""
    if problem.options is not None:
        return OptionRunner(problem, problem.layer)
    return FastseqRunner(problem, converted(problem))
