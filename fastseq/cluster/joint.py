"""The joint training of encoder and centres in deep embedded clustering (Xie, Girshick & Farhadi 2016, section 3).

Every ``update_interval`` steps the whole data set is encoded, and from its soft assignment come the target P (or the
frequencies that P is made of) and the labels, whose change decides when to stop. A checkpoint is taken just before:
what follows is a function of parameters, optimizer and step alone, so P need not be in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import functional as F
from fastseq._interrupt import deferred
from fastseq._seeds import Noise, generator
from fastseq.autoencoder.base import Autoencoder
from fastseq.autoencoder.denoising import corrupted
from fastseq.autoencoder.points import Points
from fastseq.autoencoder.ranks import Ranks
from fastseq.autoencoder.training import Bar, autocast, make_optimizer

_BATCH = 2048  # points encoded at a time
_ORDER, _NOISE = 3, 4  # places of the random numbers; training.py has 0 to 2

State = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How the joint training goes: the arguments of DEC of the same names."""

    alpha: float
    optimizer: str
    learning_rate: float
    momentum: float
    batch_size: int
    update_interval: int
    tol: float
    max_iter: int
    target: str
    reconstruction_weight: float
    train_encoder: bool
    corruption: str
    clustering_noise: float
    precision: str
    seed: int


class _Loss(nn.Module):
    """The loss of one batch; its parameters are those that are trained."""

    def __init__(self, autoencoder: Autoencoder, centers: Tensor, settings: Settings) -> None:
        super().__init__()
        self.centers = nn.Parameter(centers)
        self.settings = settings
        # Only what gets gradients may be registered: several processes wait for the gradient of every parameter.
        self.trained = nn.ModuleList()
        if settings.train_encoder:
            self.trained.append(autoencoder.encoder)
            if settings.reconstruction_weight:
                self.trained.append(autoencoder.decoder)
        self._autoencoder = [autoencoder]  # in a list, so that it is not registered

    def forward(self, x: Tensor, target: Tensor | None, freq: Tensor | None, noise: Noise) -> Tensor:
        autoencoder, weight = self._autoencoder[0], self.settings.reconstruction_weight
        seen = corrupted(x, self.settings.corruption, self.settings.clustering_noise, noise)
        with torch.set_grad_enabled(self.settings.train_encoder and torch.is_grad_enabled()):
            z = autoencoder.code(seen)
        # The sum over points: several processes need not have equally many.
        loss = F.clustering_loss(z, self.centers, target, freq=freq, alpha=self.settings.alpha)
        if weight and self.settings.train_encoder:
            loss = loss + weight * (autoencoder.decoded(z) - x).square().mean(1).sum()
        return loss


class Joint:
    """The joint training of ``autoencoder`` and ``centers [K, m]`` on ``points``."""

    def __init__(self, autoencoder: Autoencoder, centers: Tensor, points: Points, settings: Settings) -> None:
        self.autoencoder, self.points, self.settings = autoencoder, points, settings
        self.ranks = Ranks.found()
        self.loss = _Loss(autoencoder, centers.clone(), settings)
        self.module = self.ranks.parallel(self.loss)
        self.optimizer = make_optimizer(
            list(self.loss.parameters()), settings.optimizer, settings.learning_rate, settings.momentum, 0.0
        )
        self.step_number = 0
        self.labels: Tensor | None = None  # of the last refresh, all points
        self.history: list[dict[str, float]] = []
        self.converged = False
        self.target: Tensor | None = None
        self.freq: Tensor | None = None

    @property
    def centers(self) -> Tensor:
        """The centres as they are now: ``[K, m]``."""
        return self.loss.centers.detach()

    def state(self) -> State:
        """All that is needed to go on, just before a refresh."""
        return {
            "parameters": self.autoencoder.state_dict(),
            "centers": self.centers,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_number,
            "labels": self.labels,
            "history": self.history,
        }

    def restore(self, state: State) -> None:
        """Goes to where ``state`` was taken."""
        self.autoencoder.load_state_dict(state["parameters"])
        with torch.no_grad():
            self.loss.centers.copy_(state["centers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number, self.history = state["step"], state["history"]
        self.labels = None if state["labels"] is None else state["labels"].to(self.points.device)

    @torch.no_grad()
    def encode(self) -> Tensor:
        """The codes of this process's share of the points, in its part of their order."""
        share = self.ranks.share(len(self.points))
        with autocast(self.settings.precision, self.points.device):
            parts = [self.autoencoder.code(x) for x in self.points.batches(_BATCH, share.start, share.stop)]
        return torch.cat(parts) if parts else self.centers.new_empty(0, self.centers.shape[1])

    @torch.no_grad()
    def refresh(self) -> float:
        """Makes frequencies, target and labels of the whole data; returns the share of points that changed cluster."""
        settings, ranks, count = self.settings, self.ranks, len(self.points)
        z, centers = self.encode(), self.centers
        freq = ranks.sum(F.accumulate_frequencies([z], centers, alpha=settings.alpha))
        total = ranks.sum(F.clustering_loss(z, centers, freq=freq, alpha=settings.alpha).double())
        # The centre that is nearest is the one of the largest q.
        labels = ranks.gather(F.nearest_center(z, centers)[0], count)
        if settings.target == "stored":
            q = F.student_t_assignment(z, centers, settings.alpha)
            self.target = ranks.gather(F.target_distribution(q, freq.to(q.dtype)), count)
        else:
            self.freq = freq
        changed = 1.0 if self.labels is None else (labels != self.labels).double().mean().item()
        self.labels = labels
        self.history.append({"step": float(self.step_number), "loss": total.item() / count, "changed": changed})
        return changed

    def step(self) -> None:
        """One step of the optimizer."""
        settings, count = self.settings, len(self.points)
        per_epoch = -(-count // settings.batch_size)
        epoch, batch = divmod(self.step_number, per_epoch)
        if batch == 0 or not hasattr(self, "order"):
            self.order = torch.randperm(count, generator=generator(settings.seed, _ORDER, epoch))
        rows = self.order[batch * settings.batch_size : (batch + 1) * settings.batch_size]
        share = self.ranks.share(len(rows))
        mine = rows[share]
        x = self.points.take(mine)
        noise = Noise(generator(settings.seed, _NOISE, self.step_number, device=x.device), share.start, len(rows))
        target = None if self.target is None else self.target.index_select(0, mine.to(self.target.device))
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(settings.precision, self.points.device):
            loss = self.module(x, target, self.freq, noise)
        (loss * (self.ranks.count / len(rows))).backward()  # the mean over the batch of all processes
        self.optimizer.step()
        self.step_number += 1

    def run(self, save: Callable[[State], None] | None, interval: float, progress: bool) -> None:
        """Trains until fewer than ``tol`` of the points change cluster, or ``max_iter`` steps are done.

        Raises:
            ValueError: the loss is not finite any more.
            KeyboardInterrupt: at the first refresh after Ctrl-C, or at once at the second Ctrl-C.
        """
        settings = self.settings
        save = save if self.ranks.first else None
        bar = Bar(settings.max_iter, "clustering", progress and self.ranks.first, self.step_number)
        saved = time.monotonic()
        try:
            with deferred(save is not None and self.ranks.count == 1) as interrupt:
                while True:
                    if self.step_number % settings.update_interval == 0 or self.step_number >= settings.max_iter:
                        if save is not None and (interrupt.asked or time.monotonic() - saved >= interval):
                            save(self.state())
                            saved = time.monotonic()
                        if interrupt.asked:
                            raise KeyboardInterrupt
                        changed = self.refresh()
                        facts = self.history[-1]
                        if not abs(facts["loss"]) < float("inf"):
                            raise ValueError(
                                f"the loss is {facts['loss']} at step {self.step_number}: lower learning_rate"
                            )
                        self.converged = self.step_number > 0 and changed < settings.tol
                        if self.converged or self.step_number >= settings.max_iter:
                            return
                    self.step()
                    bar.advance(loss=f"{facts['loss']:.4f}", changed=f"{100 * facts['changed']:.2f}%")
        finally:
            bar.close()
