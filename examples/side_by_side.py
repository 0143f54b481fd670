"""What the examples of :class:`fastseq.models.SequenceEncoder` share: one model, trained with fastseq and torch.nn.

Both start from the same weights and see the same batches, and take turns at every step, so that a machine that slows
down does so for both.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastseq


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch: int = 64,
    learning_rate: float = 3e-3,
) -> tuple[dict[str, nn.Module], float]:
    """Trains ``model`` and its twin of torch's layers on x [N, T, I], y [N, …].

    Returns:
        Both, as "fastseq" and "torch.nn", and how many times faster a training step of fastseq's was.
    """
    models = {"fastseq": model, "torch.nn": fastseq.to_torch(copy.deepcopy(model))}
    optimizers = {name: torch.optim.Adam(each.parameters(), lr=learning_rate) for name, each in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            some, wanted = x[chosen], y[chosen]
            for name in list(models)[:: 1 if len(seconds["fastseq"]) % 2 else -1]:
                start = time.perf_counter()
                optimizers[name].zero_grad()
                loss(models[name](some), wanted).backward()
                nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
                optimizers[name].step()
                seconds[name].append(time.perf_counter() - start)
    ours, theirs = (torch.tensor(seconds[name][5:]).median().item() for name in models)
    return models, theirs / ours
