"""The layers that the GPU benchmark compares: ``torch.nn`` (cuDNN), and fastseq with its Triton kernels forced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.kernels import lstm, rnn
from fastseq.testing import compare_tensor, use_implementation

MODES = ("forward", "training")
#: float32 twice: with exact products, and with tf32 allowed to both libraries.
KINDS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
VERIFIED_STEPS = 96


@dataclass(frozen=True)
class Case:
    """One layer or stack. ``time`` is "", "lengths" (torch packs) or "reset" (torch loops over the steps)."""

    op: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    time: str = ""

    @property
    def name(self) -> str:
        """As the tables show it."""
        notes = [self.op, f"{self.T}, {self.B}, {self.I}, {self.H}, {self.layers}"]
        notes += ["bidirectional"] * self.bidirectional + [self.time] * bool(self.time)
        return " ".join(notes)


#: The most important first.
CASES = (
    Case("lstm", 1024, 16, 768, 768),
    Case("lstm", 512, 64, 512, 512),
    Case("lstm", 128, 32, 256, 256),
    Case("lstm", 100, 256, 128, 128),
    Case("lstm", 512, 64, 512, 512, time="lengths"),
    Case("lstm", 512, 64, 512, 512, time="reset"),
    Case("lstm", 35, 20, 650, 650, layers=2),
    Case("lstm", 512, 64, 512, 512, layers=2, bidirectional=True),
    Case("lstm", 1000, 32, 1024, 1024),
    Case("lstm", 2000, 8, 96, 384),
    Case("rnn", 1000, 4, 1792, 1792),
)


def tiny(case: Case) -> Case:
    """The same with sizes that the interpreter gets through."""
    return replace(case, T=3, B=2, I=3, H=16)


class Mismatch(Exception):
    """fastseq's results are not those of the float64 reference."""


class Pair:
    """The same layer in both libraries, with one input."""

    def __init__(self, case: Case, kind: str, device: torch.device, implementation: str = "triton") -> None:
        torch.manual_seed(0)
        self.case, self.kind, self.device = case, kind, device
        self.implementation = implementation
        dtype = KINDS[kind]
        layer = nn.LSTM if case.op == "lstm" else nn.RNN
        self.peer = layer(case.I, case.H, case.layers, bidirectional=case.bidirectional).to(device, dtype)
        self.ours: nn.Module = fastseq.convert(copy.deepcopy(self.peer))
        self.input = self._random(case.T, case.B, case.I).to(dtype)
        self.grad = self._random(case.T, case.B, case.H * (2 if case.bidirectional else 1)).to(dtype)
        self.lengths = torch.randint(1 + case.T // 4, case.T + 1, (case.B,)) if case.time == "lengths" else None
        self.reset = (torch.rand(case.T, case.B) < 0.02).to(device) if case.time == "reset" else None

    def _random(self, *shape: int) -> Tensor:
        return 2 * torch.rand(shape, device=self.device) - 1

    def precise(self) -> None:
        """Sets what both libraries may do to float32 products."""
        allowed = self.kind == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed

    def by_fastseq(self, input: Tensor) -> Tensor:
        """y [T, B, D·H]."""
        with use_implementation(self.implementation):
            y: Tensor = self.ours(input, lengths=self.lengths, reset=self.reset)[0]
            return y

    def by_torch(self, input: Tensor) -> Tensor:
        """y, or for lengths the packed rows of it."""
        if self.lengths is not None:
            packed = nn.utils.rnn.pack_padded_sequence(input, self.lengths, enforce_sorted=False)
            rows: Tensor = self.peer(packed)[0].data
            return rows
        if self.reset is None:
            y: Tensor = self.peer(input)[0]
            return y
        # What one writes without fastseq: a step at a time, the state multiplied by zero where an episode starts.
        keep = (~self.reset).to(input.dtype)[..., None]
        state = tuple(input.new_zeros(1, self.case.B, self.case.H) for _ in range(2))
        steps = []
        for t in range(self.case.T):
            step, state = self.peer(input[t : t + 1], tuple(value * keep[t] for value in state))
            steps.append(step)
        return torch.cat(steps)

    def forward(self, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Without gradient."""
        with torch.no_grad():
            return call(self.input)

    def training(self, call: Callable[[Tensor], Tensor], layer: nn.Module) -> list[Tensor]:
        """The output and the gradients of input and weights."""
        input = self.input.detach().requires_grad_()
        with use_implementation(self.implementation):  # the backward too is fastseq's where the layer is
            y = call(input)
            grad = self.grad if y.shape == self.grad.shape else self.grad.flatten(0, 1)[: y.shape[0]]
            return [y.detach(), *torch.autograd.grad(y, [input, *layer.parameters()], grad)]

    def calls(self, mode: str) -> dict[str, Callable[[], object]]:
        """What is timed, by library."""
        if mode == "forward":
            return {"torch": lambda: self.forward(self.by_torch), "fastseq": lambda: self.forward(self.by_fastseq)}
        return {
            "torch": lambda: self.training(self.by_torch, self.peer),
            "fastseq": lambda: self.training(self.by_fastseq, self.ours),
        }

    def verify(self) -> None:
        """Holds fastseq to the float64 reference over the first steps, and two runs over all of them to the same bits.

        Raises:
            Mismatch: naming the tensor.
        """
        short = Pair(replace(self.case, T=min(self.case.T, VERIFIED_STEPS)), self.kind, self.device)
        names = ["output", "gradient of the input", *(name for name, _ in self.ours.named_parameters())]
        results = []
        for implementation, wide in ((self.implementation, False), ("reference", False), ("reference", True)):
            other = copy.copy(short)
            other.implementation = implementation
            if wide:
                other.ours = copy.deepcopy(short.ours).double()
                other.input, other.grad = short.input.double(), short.grad.double()
            results.append(other.training(other.by_fastseq, other.ours))
        for name, got, ref, truth in zip(names, *results, strict=True):
            found = compare_tensor(name, got, ref, truth)
            if self.kind == "tf32":  # the rule, with the eps of the products: ten bits, as float16 has
                allowed = found.allowed + 2 * torch.finfo(torch.float16).eps * truth.abs().max().item()
                found = replace(found, allowed=allowed, ok=found.error <= allowed)
            if not found.ok:
                raise Mismatch(f"{self.case.name} {self.kind}: {found}")
        first = self.training(self.by_fastseq, self.ours)
        for name, a, b in zip(names, first, self.training(self.by_fastseq, self.ours), strict=True):
            if not torch.isfinite(a).all() or not torch.equal(a, b):
                raise Mismatch(f"{self.case.name} {self.kind}: {name} is not finite, or differs from run to run")

    def plans(self) -> dict[str, str]:
        """Which regime serves each pass of a layer."""
        kernels: Any = lstm if self.case.op == "lstm" else rnn
        sizes = self.case.T, self.case.B, self.case.H, KINDS[self.kind], self.device
        return {
            name: str(kernels.plan_for(*sizes, backward)) for name, backward in (("forward", False), ("backward", True))
        }


def reference_of(pair: Pair) -> Callable[[Tensor], Tensor]:
    """The reference's formula for the LSTM of a pair, in one direction: y from x. The layer itself is one operation,
    into which torch.compile does not look."""
    state = pair.input.new_zeros(pair.case.B, pair.case.H)

    def y(x: Tensor) -> Tensor:
        for layer in range(pair.case.layers):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            x = fastseq.reference.lstm(x, state, state, *(getattr(pair.peer, f"{name}_l{layer}") for name in names))[0]
        return x

    return y
