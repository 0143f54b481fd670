"""One training loop for every autoencoder: minibatches, bar, history, early stop, checkpoints, several processes.

Nothing random is carried from step to step (:mod:`fastseq._seeds`), so the state of a training is its parameters, its
optimizer and its position; what goes on from a checkpoint takes the same steps, bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastseq._extras import require
from fastseq._interrupt import deferred
from fastseq._seeds import Noise, generator
from fastseq.autoencoder.points import Points
from fastseq.autoencoder.ranks import Ranks

OPTIMIZERS = ("adam", "sgd")
PRECISIONS = ("float32", "bfloat16")

Terms = Callable[[Tensor, Noise], dict[str, Tensor]]
State = dict[str, Any]

# Places of the random numbers.
_ORDER, _NOISE, _VALIDATION = range(3)


@dataclass(frozen=True)
class Plan:
    """How a training goes.

    Attributes:
        epochs: passes over the data.
        batch_size: points in a step, over all processes together.
        optimizer: ``"adam"`` or ``"sgd"``.
        learning_rate: of the first step.
        momentum: of SGD.
        weight_decay: of either.
        decay_epochs: the learning rate is multiplied by ``decay`` each time so many epochs have passed.
        decay: that factor.
        seed: of the order of the points and of all noise.
        precision: ``"bfloat16"`` computes the products of all layers but the one that makes the code in bfloat16
            (``torch.autocast``); parameters, gradients and optimizer stay in float32.
        patience: stop when the loss (of the validation data, if there are any) has not fallen by ``min_delta`` for so
            many epochs, and take the parameters of the best epoch. None: never.
        min_delta: the least fall that counts.
    """

    epochs: int = 100
    batch_size: int = 256
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay_epochs: int | None = None
    decay: float = 0.1
    seed: int = 0
    precision: str = "float32"
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "decay_epochs", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("epochs", "weight_decay", "momentum", "min_delta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        for name, choices in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")


def make_optimizer(
    parameters: Sequence[nn.Parameter], kind: str, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Adam or SGD, in torch's fused form."""
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which the forward pass computes."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def as_module(terms: Terms, *trained: nn.Module) -> nn.Module:
    """A module whose forward is ``terms`` and whose parameters are those of ``trained``: several processes want one."""
    return _Step(terms, *trained)


class _Step(nn.Module):
    def __init__(self, terms: Terms, *trained: nn.Module) -> None:
        super().__init__()
        self.terms = terms
        self.trained = nn.ModuleList(trained)

    def forward(self, x: Tensor, noise: Noise) -> dict[str, Tensor]:
        return self.terms(x, noise)


class Bar:
    """A tqdm bar, or nothing."""

    def __init__(self, total: int, label: str, show: bool, initial: int = 0) -> None:
        self._bar = require("tqdm", "train", "a progress bar").tqdm(
            total=total, initial=initial, desc=label, disable=not show, leave=True, dynamic_ncols=True
        )

    def advance(self, **facts: str) -> None:
        """One on, with what is worth knowing."""
        self._bar.update()
        if facts:
            self._bar.set_postfix(facts, refresh=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


class Training:
    """A training of ``terms`` over ``points``: see :func:`train`."""

    def __init__(
        self, terms: Terms, trained: Sequence[nn.Module], points: Points, plan: Plan, validation: Points | None
    ) -> None:
        self.terms, self.points, self.plan, self.validation = terms, points, plan, validation
        self.ranks = Ranks.found()
        self.trained = nn.ModuleList(trained)
        self.parameters = list(self.trained.parameters())
        self.module = self.ranks.parallel(as_module(terms, *trained))
        self.optimizer = make_optimizer(
            self.parameters, plan.optimizer, plan.learning_rate, plan.momentum, plan.weight_decay
        )
        self.epoch = self.batch = 0
        self.sums: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.best: State | None = None
        self.since_best = 0

    @property
    def batches(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.points) // self.plan.batch_size)

    def state(self) -> State:
        """All that is needed to go on."""
        return {
            "plan": asdict(self.plan),
            "parameters": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self.sums,
            "history": self.history,
            "best": self.best,
            "since_best": self.since_best,
        }

    def restore(self, state: State) -> None:
        """Goes to where ``state`` was taken.

        Raises:
            ValueError: it comes from a training with another plan.
        """
        for name, value in asdict(self.plan).items():
            if name != "epochs" and state["plan"].get(name) != value:
                raise ValueError(f"{name}: expected {state['plan'].get(name)!r}, as in the checkpoint, got {value!r}")
        self.trained.load_state_dict(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.sums = {name: value.to(self.points.device) for name, value in state["sums"].items()}
        self.history, self.best, self.since_best = state["history"], state["best"], state["since_best"]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        waited = self.plan.patience is not None and self.since_best >= self.plan.patience
        return self.epoch >= self.plan.epochs or waited

    def order(self) -> Tensor:
        """The order of the points in this epoch."""
        return torch.randperm(len(self.points), generator=generator(self.plan.seed, _ORDER, self.epoch))

    def step(self, order: Tensor) -> None:
        """One step of the optimizer."""
        plan = self.plan
        rows = order[self.batch * plan.batch_size : (self.batch + 1) * plan.batch_size]
        share = self.ranks.share(len(rows))
        x = self.points.take(rows[share])
        place = (plan.seed, _NOISE, self.epoch, self.batch)
        noise = Noise(generator(*place, device=x.device), share.start, len(rows))
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(plan.precision, x.device):
            terms = self.module(x, noise)
        loss = torch.stack(list(terms.values())).sum()
        # The terms are means over this process's rows, and the gradients will be averaged over processes.
        (loss * (len(x) * self.ranks.count / len(rows))).backward()
        self.optimizer.step()
        for name, value in terms.items():
            total = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=x.device))
            total += value.detach().double() * len(x)
        self.batch += 1

    def end_epoch(self) -> None:
        """History, learning rate and early stop."""
        plan, count = self.plan, len(self.points)
        means = {name: self.ranks.sum(value).item() / count for name, value in self.sums.items()}
        entry = {"epoch": float(self.epoch + 1), "loss": sum(means.values()), **means}
        if self.validation is not None:
            entry["validation"] = self.validate(self.validation)
        self.history.append(entry)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        if plan.decay_epochs is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = plan.learning_rate * plan.decay ** (self.epoch // plan.decay_epochs)
        if plan.patience is not None:
            judged = entry.get("validation", entry["loss"])
            if self.best is None or judged < self.best["loss"] - plan.min_delta:
                self.best = {"loss": judged, "parameters": copy.deepcopy(self.trained.state_dict())}
                self.since_best = 0
            else:
                self.since_best += 1

    @torch.no_grad()
    def validate(self, points: Points) -> float:
        """The loss over other points, with noise that is the same each time."""
        total = 0.0
        for index, x in enumerate(points.batches(self.plan.batch_size)):
            noise = Noise(generator(self.plan.seed, _VALIDATION, index, device=x.device), 0, len(x))
            with autocast(self.plan.precision, x.device):
                total += sum(value.item() for value in self.terms(x, noise).values()) * len(x)
        return total / len(points)


def train(
    terms: Terms,
    trained: Sequence[nn.Module],
    points: Points,
    plan: Plan,
    *,
    validation: Points | None = None,
    save: Callable[[State], None] | None = None,
    interval: float = 30.0,
    state: State | None = None,
    progress: bool = True,
    label: str = "training",
) -> list[dict[str, float]]:
    """Minimises the sum of ``terms`` over ``points``.

    Args:
        terms: a batch ``[B, d]`` and its noise to the terms of the loss by name, each a mean over the batch.
        trained: the modules whose parameters are trained.
        points: the data.
        plan: how.
        validation: other points, whose loss decides on the early stop.
        save: called with the state every ``interval`` seconds, at the end, and before Ctrl-C stops the training.
        interval: seconds between two calls of ``save``.
        state: one that ``save`` got, to go on from.
        progress: show a bar.
        label: what the bar says.

    Returns:
        One entry per epoch: ``epoch`` (from 1), ``loss``, its terms, and ``validation``.

    Raises:
        ValueError: ``state`` is from another plan, or the loss has become NaN or infinite.
        KeyboardInterrupt: after the step at which Ctrl-C came; the state has been saved.
    """
    training = Training(terms, trained, points, plan, validation)
    if state is not None:
        training.restore(state)
    ranks = training.ranks
    save = save if ranks.first else None
    # Within an epoch each of several processes has sums of its own, which one file would not hold.
    midway = save if ranks.count == 1 else None
    bar = Bar(plan.epochs, label, progress and ranks.first, training.epoch)
    saved = time.monotonic()
    try:
        with deferred(midway is not None) as interrupt:
            while not training.finished:
                order = training.order()
                while training.batch < training.batches:
                    training.step(order)
                    due = time.monotonic() - saved >= interval
                    if midway is not None and (due or interrupt.asked):
                        midway(training.state())
                        saved = time.monotonic()
                    if interrupt.asked:
                        raise KeyboardInterrupt
                training.end_epoch()
                loss = training.history[-1]["loss"]
                if not abs(loss) < float("inf"):
                    raise ValueError(f"the loss is {loss} after epoch {training.epoch}: lower learning_rate")
                bar.advance(loss=f"{loss:.4g}")
                if save is not None and midway is None:
                    save(training.state())
        if training.best is not None:
            training.trained.load_state_dict(training.best["parameters"])
        if save is not None:
            save(training.state())
    finally:
        bar.close()
    return training.history
