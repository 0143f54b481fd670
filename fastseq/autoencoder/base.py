"""The autoencoder: an encoder to a code of few numbers and a decoder back, trained to give its input again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import checkpoint as files
from fastseq._seeds import Noise
from fastseq.autoencoder.points import Points
from fastseq.autoencoder.training import Plan, State, train
from fastseq.errors import ShapeError

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "elu": nn.ELU}
OUTPUTS = ("linear", "sigmoid")
_BATCH = 2048  # points that encode, decode and reconstruct take at a time


class Float32Linear(nn.Linear):
    """A linear layer that stays out of autocast: in bfloat16 a code would keep three digits."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def stack(sizes: Sequence[int], activation: str, last: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Linear layers from ``sizes[0]`` to ``sizes[-1]`` numbers, with activations between them and none at the end."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()
    return nn.Sequential(*layers, last(sizes[-2], sizes[-1]))


class Autoencoder(nn.Module):
    """Minimises ``L(x, g(f(x)))``, the mean square over points and features (Rumelhart, Hinton & Williams 1986).

    The base of the other autoencoders, which say how the input is corrupted and what else the loss has.

    Args:
        input_size: d, features of a point.
        hidden_sizes: widths of the encoder's hidden layers; the decoder has them in reverse.
        code_size: m, numbers in a code. The code is linear.
        activation: of the hidden layers: ``"relu"``, ``"tanh"``, ``"sigmoid"``, ``"gelu"`` or ``"elu"``.
        output: ``"linear"``, or ``"sigmoid"`` for data in [0, 1].

    Raises:
        ValueError: a size below 1, or no such activation or output.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int] = (500, 500, 2000),
        code_size: int = 10,
        *,
        activation: str = "relu",
        output: str = "linear",
    ) -> None:
        super().__init__()
        sizes = (input_size, *hidden_sizes, code_size)
        for name, value in (("input_size", (input_size,)), ("hidden_sizes", hidden_sizes), ("code_size", (code_size,))):
            if any(size < 1 for size in value):
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if output not in OUTPUTS:
            raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
        self.input_size, self.hidden_sizes, self.code_size = input_size, tuple(hidden_sizes), code_size
        self.activation, self.output = activation, output
        self.encoder = stack((*sizes[:-1], self._encoder_outputs()), activation, Float32Linear)
        self.decoder = stack(sizes[::-1], activation)
        self.history_: list[dict[str, float]] = []

    def _encoder_outputs(self) -> int:
        return self.code_size

    def arguments(self) -> dict[str, Any]:
        """What the constructor got, for a checkpoint."""
        return {
            "input_size": self.input_size,
            "hidden_sizes": list(self.hidden_sizes),
            "code_size": self.code_size,
            "activation": self.activation,
            "output": self.output,
        }

    # What a subclass says.

    def code(self, x: Tensor) -> Tensor:
        """Codes ``[B, m]`` of a batch ``[B, d]``, differentiable."""
        z: Tensor = self.encoder(x)
        return z

    def decoded(self, z: Tensor) -> Tensor:
        """Points ``[B, d]`` of codes ``[B, m]``, differentiable."""
        x: Tensor = self.decoder(z)
        return torch.sigmoid(x) if self.output == "sigmoid" else x

    def corrupt(self, x: Tensor, noise: Noise) -> Tensor:
        """What the encoder sees in training instead of ``x``."""
        return x

    def terms(self, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        """The terms of the loss, whose sum is minimised: scalars, each a mean over the batch ``x [B, d]``."""
        z = self.code(self.corrupt(x, noise))
        return {"reconstruction": (self.decoded(z) - x).square().mean()}

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction ``[B, d]`` of a batch, differentiable."""
        return self.decoded(self.code(x))

    # What a user calls.

    def fit(
        self,
        data: Any,
        plan: Plan | None = None,
        *,
        validation: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_interval: float = 30.0,
        progress: bool = True,
        **changes: Any,
    ) -> list[dict[str, float]]:
        """Trains encoder and decoder.

        Args:
            data: ``[N, d]``: an array, a memory map, a tensor, or a ``torch.utils.data.Dataset`` of rows. Of it only
                the batch at hand is held in memory.
            plan: epochs, batches, optimizer, seed and so on: :class:`fastseq.autoencoder.Plan`.
            validation: other points, whose loss is in the history and decides on the early stop (``patience``).
            checkpoint: a file that the state of the training is kept in, every ``checkpoint_interval`` seconds, when
                Ctrl-C is pressed, and at the end. If it exists, the training goes on from there, with the same bits as
                one that never stopped.
            checkpoint_interval: seconds.
            progress: show a bar.
            changes: fields of the plan, such as ``epochs=10``.

        Returns:
            The history, one entry per epoch, which is also in ``history_``.

        Raises:
            ValueError, TypeError: a field of the plan that is none, or out of range; a checkpoint of another training;
                a loss that is not finite.
            fastseq.ShapeError: data of another width.
        """
        plan = replace(plan or Plan(), **changes)
        points = self._points(data, "data")
        others = None if validation is None else self._points(validation, "validation")
        path = None if checkpoint is None else Path(checkpoint)
        header = {"kind": type(self).__name__, "arguments": self.arguments(), "data": points.fingerprint()}
        state = None
        if path is not None and path.exists():
            state = files.load(path)
            for name, value in header.items():
                if state.get(name) != value:
                    raise ValueError(f"{path}: its {name} is {state.get(name)!r}, and that of this training {value!r}")

        def save(training: State) -> None:
            assert path is not None
            files.save(path, {**header, "training": training})

        self.train()
        self.history_ = self._train(
            points,
            plan,
            validation=others,
            save=None if path is None else save,
            interval=checkpoint_interval,
            state=None if state is None else state["training"],
            progress=progress,
        )
        self.eval()
        return self.history_

    def _train(self, points: Points, plan: Plan, **options: Any) -> list[dict[str, float]]:
        return train(self.terms, (self,), points, plan, label=type(self).__name__, **options)

    def encode(self, x: Any) -> Tensor:
        """Codes ``[N, m]`` of points ``[N, d]`` (as for :meth:`fit`), without gradient, a batch at a time."""
        return torch.cat([self.code(batch) for batch in self._batches(x)])

    def decode(self, z: Any) -> Tensor:
        """Points ``[N, d]`` of codes ``[N, m]``, without gradient."""
        dtype, device = self._place()
        codes = torch.as_tensor(z).to(device, dtype)
        if codes.ndim != 2 or codes.shape[1] != self.code_size:
            raise ShapeError(f"z: expected shape [N, {self.code_size}], got {list(codes.shape)}")
        with torch.no_grad():
            return torch.cat([self.decoded(part) for part in codes.split(_BATCH)])

    def reconstruct(self, x: Any) -> Tensor:
        """What the autoencoder makes of points ``[N, d]``: ``[N, d]``, without gradient."""
        return torch.cat([self.forward(batch) for batch in self._batches(x)])

    def _place(self) -> tuple[torch.dtype, torch.device]:
        parameter = next(self.parameters())
        return parameter.dtype, parameter.device

    def _points(self, data: Any, name: str) -> Points:
        points = Points(data, *self._place(), name=name)
        if points.features != self.input_size:
            raise ShapeError(f"{name}: expected {self.input_size} features, got {points.features}")
        return points

    def _batches(self, x: Any) -> Iterator[Tensor]:
        for batch in self._points(x, "x").batches(_BATCH):
            with torch.no_grad():
                yield batch
