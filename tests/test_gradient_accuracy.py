"""Gradients are no further from float64 than torch.nn's, by the rule of fastseq.testing, over long sequences too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq.testing import compare_tensor

LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "lstm": (nn.LSTM, fastseq.LSTM),
    "rnn": (nn.RNN, fastseq.RNN),
}


def gradients(layer: nn.Module, weights: dict[str, Tensor], x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Of every weight."""
    layer.to(x.dtype).load_state_dict(weights)
    y, _ = layer(x)
    y.backward(grad_y)
    return {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("size", [(1000, 1, 128), (300, 7, 65)], ids=str)
@pytest.mark.parametrize("op", LAYERS)
def test_as_accurate_as_torch(op: str, size: tuple[int, int, int], backend: str, seed: int) -> None:
    if backend == "reference":
        pytest.skip("the reference adds up the gradients of a bias step by step: autograd's order, not a kernel's")
    T, B, H = size
    theirs, ours = LAYERS[op]
    made: Any = theirs(H, H)
    weights, x, grad_y = made.state_dict(), torch.randn(T, B, H), torch.randn(T, B, H)
    truth = gradients(theirs(H, H), {k: v.double() for k, v in weights.items()}, x.double(), grad_y.double())
    torchs = gradients(made, weights, x, grad_y)
    for name, got in gradients(ours(H, H), weights, x, grad_y).items():
        result = compare_tensor(name, got, ref=torchs[name], truth=truth[name])
        assert result.ok, result
