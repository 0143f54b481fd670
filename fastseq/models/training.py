"""Training a language model on a stream of text, with truncated BPTT, and going on exactly where it was stopped.

The text is cut into ``batch`` streams that run side by side; a window of ``window`` steps of each is one training step,
and the state, but no gradient, goes from window to window (Williams & Peng 1990; Mikolov et al. 2010). Everything that
decides the next bit is in the checkpoint: weights, optimizer, carried state, place in the text, and torch's generators.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastseq import checkpoint
from fastseq._extras import require
from fastseq.functional import detach_state
from fastseq.models.cross_entropy import IGNORED
from fastseq.models.language_model import LanguageModel
from fastseq.models.saving import BEST, LAST, load_language_model, save_language_model
from fastseq.models.text import Vocabulary

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        batch: B, streams side by side.
        window: T, steps of truncated BPTT.
        epochs: passes over the text.
        learning_rate: of Adam, at its highest.
        schedule: ``"cosine"``, down to a tenth over all steps (Loshchilov & Hutter 2017), or ``"constant"``.
        warmup: steps over which the learning rate rises from zero.
        clip: the gradient's norm is clipped to it (Pascanu et al. 2013, algorithm 1).
        evaluate_every: steps between evaluations and checkpoints; once an epoch if None.
        patience: evaluations without a better one before training stops; never if None.
        bfloat16: whether to compute under autocast to bfloat16.
        seed: of the weights (where the command line makes them) and of dropout.
    """

    batch: int = 32
    window: int = 128
    epochs: int = 10
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup: int = 50
    clip: float = 1.0
    evaluate_every: int | None = None
    patience: int | None = None
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "window", "epochs", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected a whole number of at least 0, got {self.warmup!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {self.schedule!r}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``steps``."""
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        return rate


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        nats: mean cross entropy of a token.
        tokens: how many were predicted.
        characters: how many characters they are.
    """

    nats: float
    tokens: int
    characters: int

    @property
    def perplexity(self) -> float:
        """exp(nats): among so many equally likely tokens the model would be as unsure."""
        return math.exp(self.nats)

    @property
    def bits_per_character(self) -> float:
        """The total in bits, over the characters."""
        return self.nats * self.tokens / math.log(2) / self.characters

    def summary(self) -> dict[str, float]:
        """All figures by name."""
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_character": self.bits_per_character}


def streams(tokens: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """A text as ``batch`` streams side by side: inputs and their successors, each int64 [T, B].

    Every token but the first is a target once; what is past the end has the target -100.
    """
    count = tokens.numel() - 1
    batch = min(batch, count)
    steps = -(-count // batch)
    places = torch.arange(steps).unsqueeze(1) + steps * torch.arange(batch)  # [T, B]
    inputs = tokens[places.clamp(max=count)]
    targets = tokens[(places + 1).clamp(max=count)].masked_fill(places >= count, IGNORED)
    return inputs, targets


@torch.no_grad()
def evaluate(
    model: LanguageModel, tokens: Tensor, vocabulary: Vocabulary, *, batch: int = 32, window: int = 256
) -> Evaluation:
    """Predicts every token but the first, with the state carried along ``batch`` streams that start from zeros.

    Args:
        model: dropout is off meanwhile.
        tokens: int64 [N], N at least 2.
        vocabulary: says how many characters the tokens are.
        batch: 1 reads the text as one stream: slower, and a little better.
        window: steps at a time, which changes nothing but memory.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    if tokens.numel() < 2:
        raise ValueError(f"text: expected at least 2 tokens, the second to be predicted, got {tokens.numel()}")
    training = model.training
    model.eval()
    inputs, targets = streams(tokens, batch)
    state, total = None, 0.0
    try:
        for some, wanted in zip(inputs.split(window), targets.split(window), strict=True):
            nats, state = model.loss(some, state, targets=wanted, reduction="sum", return_state=True)
            total += nats.item()
    finally:
        model.train(training)
    count = tokens.numel() - 1
    return Evaluation(total / count, count, max(1, len(vocabulary.decode(tokens[1:]))))


@dataclass
class _Place:
    """Where a training stands."""

    step: int = 0
    state: Any = None  # carried into the next window
    best: float = math.inf  # nats
    since_best: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class LanguageModelTrainer:
    """Trains ``model`` on ``train``, judges it on ``valid``, and keeps the best and the last in ``folder``.

    Args:
        model: is trained in place.
        vocabulary: of both texts.
        train, valid: int64 [N].
        settings: how to train.
        folder: where ``best.safetensors`` and ``last.safetensors`` go; nothing is written if None. It is made at the
            first checkpoint.
        progress: whether to show a progress bar.

    Attributes:
        history: one dict an evaluation: step, seconds (of training and evaluation, over all runs), the training loss
            since the last one, and the figures of :class:`Evaluation`.

    Raises:
        ValueError: a text is too short.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        train: Tensor,
        valid: Tensor,
        settings: TrainingSettings | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        for name, tokens in (("train", train), ("valid", valid)):
            if tokens.numel() < 2:
                raise ValueError(f"{name}: expected at least 2 tokens of text, got {tokens.numel()}")
        self.model, self.vocabulary, self.train, self.valid = model, vocabulary, train, valid
        self.settings = settings or TrainingSettings()
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        self.optimizer = torch.optim.Adam(model.parameters(), lr=self.settings.learning_rate, fused=True)
        self.inputs, self.targets = streams(train, self.settings.batch)
        self.windows = -(-len(self.inputs) // self.settings.window)  # an epoch has
        self.steps = self.settings.epochs * self.windows
        self._place = _Place()

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._place.history

    @classmethod
    def resume(cls, folder: str | os.PathLike[str], train: Tensor, valid: Tensor, *, progress: bool = True) -> Self:
        """The trainer that wrote the last checkpoint in ``folder``, as it then was; torch's generators are set too.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is broken, or the texts are not those that it was trained on.
        """
        model, vocabulary, facts = load_language_model(Path(folder) / LAST)
        try:
            digest, settings, place = facts["texts"], TrainingSettings(**facts["settings"]), _Place(**facts["place"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{Path(folder) / LAST} does not say where its training stood: {error}") from None
        if digest != _digest(train, valid):
            raise ValueError(f"the texts are not those that {Path(folder) / LAST} was trained on")
        trainer = cls(model.train(), vocabulary, train, valid, settings, folder=folder, progress=progress)
        trainer.optimizer.load_state_dict(facts["optimizer"])
        trainer._place = place
        checkpoint.restore_random_states(facts["random"])
        return trainer

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        patience = self.settings.patience
        return self._place.step >= self.steps or (patience is not None and self._place.since_best >= patience)

    def run(
        self,
        *,
        seconds: float = math.inf,
        on_evaluation: Callable[[Mapping[str, Any]], bool | None] = lambda record: None,
        on_step: Callable[[int], Any] = lambda step: None,
    ) -> list[dict[str, Any]]:
        """Trains to the end of the settings, or until ``seconds`` of this run are over, or a callback stops it.

        Args:
            seconds: the last step before the end is followed by an evaluation and a checkpoint.
            on_evaluation: called with each new record of the history; returns True to stop.
            on_step: called with the number of each step, after its backward and before its gradient is clipped, such
                as a :class:`fastseq.diagnostics.GradientWatch`.

        Returns:
            The history.

        Raises:
            FloatingPointError: the loss is not finite.
            OSError: a checkpoint cannot be written.
        """
        tqdm = require("tqdm", "train", "a training").tqdm
        place, settings = self._place, self.settings
        every = settings.evaluate_every or self.windows
        start, before = time.perf_counter(), place.seconds
        losses: list[Tensor] = []
        bar = tqdm(total=self.steps, initial=place.step, unit="step", disable=not self.progress, dynamic_ncols=True)
        with bar:
            while not self.finished:
                losses.append(self._step(on_step))
                place.step += 1
                place.seconds = before + time.perf_counter() - start
                bar.update()
                over = time.perf_counter() - start >= seconds
                if not (over or place.step % every == 0 or place.step == self.steps):
                    continue
                record = self._evaluate(float(torch.stack(losses).mean()), start, before)
                losses.clear()
                bar.set_postfix_str(f"{record['bits_per_character']:.3f} bits/char")
                if on_evaluation(record) or over:
                    break
        return place.history

    def _step(self, on_step: Callable[[int], Any]) -> Tensor:
        """One window: forward, BPTT, clipping and Adam. Returns the loss."""
        settings, place = self.settings, self._place
        at = place.step % self.windows
        if at == 0:
            place.state = None  # the streams begin again
        window = slice(at * settings.window, (at + 1) * settings.window)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(place.step, self.steps)
        self.optimizer.zero_grad()
        with self._precision():
            loss, state = self.model.loss(
                self.inputs[window], detach_state(place.state), targets=self.targets[window], return_state=True
            )
        loss.backward()
        on_step(place.step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        if not norm.isfinite():
            raise FloatingPointError(
                f"step {place.step}: the norm of the gradient is {norm.item()}; nothing was changed"
            )
        self.optimizer.step()
        place.state = detach_state(state)
        value: Tensor = loss.detach()
        return value

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.train.device.type, torch.bfloat16, enabled=self.settings.bfloat16)

    def _evaluate(self, training_nats: float, start: float, before: float) -> dict[str, Any]:
        place = self._place
        with self._precision():
            found = evaluate(self.model, self.valid, self.vocabulary, batch=self.settings.batch)
        place.seconds = before + time.perf_counter() - start
        record = {"step": place.step, "seconds": place.seconds, "training_nats": training_nats, **found.summary()}
        place.history.append(record)
        better = found.nats < place.best
        place.best, place.since_best = (found.nats, 0) if better else (place.best, place.since_best + 1)
        if self.folder is not None:
            if better:
                save_language_model(self.folder / BEST, self.model, self.vocabulary, {"evaluation": record})
            save_language_model(self.folder / LAST, self.model, self.vocabulary, self._facts())
        return record

    def _facts(self) -> dict[str, Any]:
        """What :meth:`resume` reads."""
        return {
            "texts": _digest(self.train, self.valid),
            "settings": asdict(self.settings),
            "place": vars(self._place),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_states(),
        }


def _digest(*tokens: Tensor) -> str:
    digest = hashlib.sha256()
    for each in tokens:
        digest.update(each.numel().to_bytes(8, "little"))
        digest.update(each.cpu().numpy().tobytes())
    return digest.hexdigest()
