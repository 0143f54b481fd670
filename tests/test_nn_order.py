"""Unsorted lengths: the layers compute longest first, and nobody sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.nn.order import TOGETHER, BatchOrder

LENGTHS = torch.tensor([3, 9, 0, 12, 5, 12, 1, 7, 12, 2])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_order() -> None:
    x = torch.zeros(12, len(LENGTHS), 4)
    order = BatchOrder.by_length(x, LENGTHS)
    assert order is not None
    assert LENGTHS[order.there].tolist() == sorted(LENGTHS.tolist(), reverse=True)
    assert torch.equal(LENGTHS[order.there][order.back], LENGTHS)
    assert BatchOrder.by_length(x, None) is None
    assert BatchOrder.by_length(x, LENGTHS.sort(descending=True).values) is None
    assert BatchOrder.by_length(x[:, :TOGETHER], LENGTHS[:TOGETHER]) is None


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", ["lstm", "rnn"])
def test_each_sequence_is_as_if_alone(layer: str, batch_first: bool, backend: str, seed: int) -> None:
    T, B, I, H = 12, len(LENGTHS), 4, 5
    make: Any = fastseq.LSTM if layer == "lstm" else fastseq.RNN
    module = make(I, H, num_layers=2, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    x = random(T, B, I).requires_grad_()
    states = tuple(random(4, B, H).requires_grad_() for _ in range(2 if layer == "lstm" else 1))
    reset = torch.rand(T, B) < 0.2
    resets = tuple(random(T, 4, B, H) for _ in states)

    def pair(values: tuple[Tensor, ...]) -> Any:
        return values if layer == "lstm" else values[0]

    def run(x: Tensor, states: tuple[Tensor, ...], columns: slice, lengths: Tensor) -> list[Tensor]:
        steps = x.size(0)
        given = reset[:steps, columns]
        y, last, every = module(
            x.transpose(0, 1) if batch_first else x,
            pair(tuple(state[:, columns] for state in states)),
            lengths=lengths,
            reset=given.transpose(0, 1) if batch_first else given,
            reset_state=pair(tuple(state[:steps, :, columns] for state in resets)),
            return_states=True,
        )
        h = every.h.transpose(1, 2) if batch_first else every.h
        return [y.transpose(0, 1) if batch_first else y, *(last if layer == "lstm" else (last,)), h]

    everything = slice(None)
    got = run(x, states, everything, LENGTHS)
    grad_y = random(*got[0].shape)
    got_gradients = torch.autograd.grad((got[0] * grad_y).sum(), [x, *states])
    for b, length in enumerate(LENGTHS.tolist()):
        one = slice(b, b + 1)
        steps = max(length, 1)
        alone = run(x[:steps, one], states, one, LENGTHS[one])
        for mine, expected in zip(got, alone, strict=True):
            if mine.dim() == 4:  # [L D, T, B, H]
                torch.testing.assert_close(mine[:, :length, one], expected[:, :length])
            elif mine is got[0]:
                torch.testing.assert_close(mine[:length, one], expected[:length])
                assert not mine[length:, one].any()
            else:
                torch.testing.assert_close(mine[:, one], expected)
        gradients = torch.autograd.grad((alone[0] * grad_y[:steps, one]).sum(), [x, *states])
        for mine, expected in zip(got_gradients, gradients, strict=True):
            torch.testing.assert_close(mine[:, one], expected[:, one])


def test_noise_keeps_its_places(seed: int) -> None:
    """A mask is drawn for a place in the batch: the same with lengths that are sorted or not."""
    module = fastseq.LSTM(3, 4, zoneout=0.5)
    x = torch.randn(12, len(LENGTHS), 3)

    def run(lengths: Tensor) -> Tensor:
        torch.manual_seed(seed)
        result: Tensor = module(x, lengths=lengths)[0]
        return result

    full = run(torch.full_like(LENGTHS, 12))
    got = run(LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(got[:length, b], full[:length, b])
