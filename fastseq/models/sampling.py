"""Drawing the next token from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """The checks of :func:`sample`, for callers that want them before a long run."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected None or a whole number of at least 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected None or a number above 0, up to 1, got {top_p!r}")


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One draw for each row from softmax(logits / temperature), cut to the likeliest tokens.

    Args:
        logits: [B, V].
        temperature: below 1 sharpens, above 1 flattens; 0 takes the likeliest token.
        top_k: only the k likeliest tokens can be drawn.
        top_p: only the likeliest tokens that together just reach this probability (Holtzman et al. 2020, "nucleus
            sampling", section 3.1), after temperature and ``top_k``; the likeliest always can.
        generator: of the random numbers; torch's own if None.

    Returns:
        int64 [B].

    Raises:
        ValueError: an argument is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # of all that are likelier
        kept = (before < top_p).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=logits.device), True)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
