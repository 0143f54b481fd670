"""The stacked denoising autoencoder of the DEC paper: each layer is trained alone, then all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastseq._seeds import Noise
from fastseq.autoencoder.base import Autoencoder
from fastseq.autoencoder.denoising import masked
from fastseq.autoencoder.points import Points
from fastseq.autoencoder.training import Plan, State, Terms, train


class StackedDenoisingAutoencoder(Autoencoder):
    """Greedy layer-wise pretraining, then fine-tuning without corruption (Vincent et al. 2010; Xie et al. 2016).

    Layer k of the encoder and its mirror in the decoder are trained as a denoising autoencoder of the activations that
    the layers below give: ``y = g2(W2 dropout(g1(W1 dropout(x) + b1)) + b2)``, with ``g1`` the activation except for
    the code, and ``g2`` the activation except for the data. Then all are trained to reconstruct, without dropout.

    The paper's recipe is ``activation="relu"``, ``dropout=0.2``, ``layer_epochs=183``, and :meth:`fit` with
    ``epochs=366, batch_size=256, optimizer="sgd", learning_rate=0.1, decay_epochs=73`` on MNIST x 0.02: 50,000 steps a
    layer and 100,000 of all layers. It starts from N(0, 0.01²), which ``init="paper"`` gives.

    Args:
        input_size, hidden_sizes, code_size, activation, output: as for :class:`Autoencoder`.
        dropout: the share of numbers set to zero in front of each of a pair's two layers; the rest is scaled up.
        layer_epochs: epochs of each layer's own training. What else it needs is as the plan of :meth:`fit` says.
        init: ``"paper"``: weights from N(0, 0.01²) and no biases; ``"torch"``: as ``torch.nn.Linear`` starts.

    Raises:
        ValueError: a number out of range, or no such init.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int] = (500, 500, 2000),
        code_size: int = 10,
        *,
        dropout: float = 0.2,
        layer_epochs: int = 50,
        init: str = "torch",
        activation: str = "relu",
        output: str = "linear",
    ) -> None:
        super().__init__(input_size, hidden_sizes, code_size, activation=activation, output=output)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number from 0 to below 1, got {dropout}")
        if layer_epochs < 0:
            raise ValueError(f"layer_epochs: expected at least 0, got {layer_epochs}")
        if init not in ("torch", "paper"):
            raise ValueError(f"init: expected 'torch' or 'paper', got {init!r}")
        self.dropout, self.layer_epochs, self.init = dropout, layer_epochs, init
        if init == "paper":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)

    def arguments(self) -> dict[str, Any]:
        own = {"dropout": self.dropout, "layer_epochs": self.layer_epochs, "init": self.init}
        return super().arguments() | own

    def pairs(self) -> list[tuple[nn.Sequential, nn.Sequential, nn.Sequential]]:
        """For each layer: what is below it, the layer with its activation, and its mirror with its own."""
        encoder, decoder = list(self.encoder), list(self.decoder)  # linear, activation, linear, …, linear
        pairs = []
        for index in range(0, len(encoder), 2):
            mirror = len(decoder) - 1 - index
            up = nn.Sequential(*encoder[index : index + 2])
            if index == 0 and self.output == "sigmoid":
                down = nn.Sequential(decoder[mirror], nn.Sigmoid())
            else:
                down = nn.Sequential(*decoder[mirror : mirror + 2])
            pairs.append((nn.Sequential(*encoder[:index]), up, down))
        return pairs

    def layer_terms(self, below: nn.Sequential, up: nn.Module, down: nn.Module) -> Terms:
        """The loss of one layer's own training."""

        def terms(x: Tensor, noise: Noise) -> dict[str, Tensor]:
            with torch.no_grad():
                x = below(x)
            z = up(self._dropped(x, noise))
            return {"reconstruction": (down(self._dropped(z, noise)) - x).square().mean()}

        return terms

    def _dropped(self, x: Tensor, noise: Noise) -> Tensor:
        return masked(x, self.dropout, noise) / (1 - self.dropout) if self.dropout else x

    def _train(
        self,
        points: Points,
        plan: Plan,
        *,
        save: Callable[[State], None] | None = None,
        state: State | None = None,
        validation: Points | None = None,
        **options: Any,
    ) -> list[dict[str, float]]:
        """Stage by stage; a checkpoint holds all parameters, the stage, and the state of its training."""
        layers = self.pairs()
        first, inner = 0, None
        history: list[dict[str, float]] = []
        if state is not None:
            if state["plan"] != asdict(plan) and state["plan"] | {"epochs": plan.epochs} != asdict(plan):
                raise ValueError(f"plan: expected {state['plan']}, as in the checkpoint, got {asdict(plan)}")
            self.load_state_dict(state["parameters"])
            first, inner, history = state["stage"], state["inner"], state["history"]
        for stage in range(first, len(layers) + 1):
            done = list(history)

            def keep(inner: State, stage: int = stage, done: list[dict[str, float]] = done) -> None:
                if save is not None:
                    parameters = self.state_dict()
                    save(
                        {
                            "plan": asdict(plan),
                            "parameters": parameters,
                            "stage": stage,
                            "inner": inner,
                            "history": done,
                        }
                    )

            how = {"save": None if save is None else keep, "state": inner, **options}
            if stage < len(layers):
                below, up, down = layers[stage]
                # Each layer has an order and noise of its own.
                own = replace(plan, epochs=self.layer_epochs, seed=plan.seed + 1 + stage, patience=None)
                part = train(
                    self.layer_terms(below, up, down), (up, down), points, own, label=f"layer {stage + 1}", **how
                )
            else:
                part = train(self.terms, (self,), points, plan, validation=validation, label="all layers", **how)
            history = done + [entry | {"stage": float(stage)} for entry in part]
            inner = None
        return history
