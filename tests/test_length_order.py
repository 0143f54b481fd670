"""Sequences of mixed lengths, which the C++ kernels take in order of length, against the float64 reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from recurrence_cases import DTYPES, Case, draws_of, inputs_of
from torch import Tensor

from fastseq import functional as F
from fastseq.testing import assert_matches_reference, use_implementation

GATES = {"lstm": 4, "rnn": 1}


def mixed(steps: int, batch: int) -> Tensor:
    """Long and short by turns, so that in the caller's order no tile of the batch ends early, and one of length 0."""
    lengths = torch.where(torch.arange(batch) % 2 == 0, torch.randint(steps // 2, steps + 1, (batch,)), 1)
    lengths[1], lengths[-1] = 0, steps
    return lengths


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(8, 14, 5, 65, time="lengths"),
        Case(6, 29, 33, 48, P=20, time="lengths+reset", reverse=True, strided=True),
        Case(6, 67, 3, 18, time="lengths+reset", bias="none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", GATES)
def test_outputs_and_gradients(op: str, case: Case, dtype: torch.dtype, backend: str, seed: int) -> None:
    draws = [draw | {"lengths": mixed(case.T, case.B)} for draw in draws_of(case, GATES[op], dtype)]
    assert_matches_reference(op, draws, implementation=backend, seed=seed)


def results(op: str, inputs: dict[str, Any], grad_y: Tensor) -> dict[str, Tensor]:
    """What stands in the order of the batch: outputs and their inputs' gradients."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "h0", "c0") if name in inputs}
    outputs = getattr(F, op)(**inputs | leaves)
    grads = torch.autograd.grad((outputs[0] * grad_y).sum() + outputs[-1].sum(), list(leaves.values()))
    return dict(zip(("y", "h_n", "c_n"), outputs, strict=False)) | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("op", GATES)
def test_the_order_of_the_batch_changes_no_bit(op: str, backend: str, seed: int) -> None:
    if backend == "reference":
        pytest.skip("a matrix library may round by where a row stands")
    case = Case(9, 31, 7, 40, time="lengths+reset")
    inputs = inputs_of(case, GATES[op], torch.float32) | {"lengths": mixed(case.T, case.B)}
    grad_y, order = torch.randn(case.T, case.B, case.H), torch.randperm(case.B)
    moved = {name: inputs[name].index_select(1 if inputs[name].dim() == 3 else 0, order) for name in ("x", "h0")}
    moved |= {"c0": inputs["c0"][order]} if op == "lstm" else {}
    moved |= {"lengths": inputs["lengths"][order], "reset": inputs["reset"][:, order]}
    one, other = results(op, inputs, grad_y), results(op, inputs | moved, grad_y[:, order])
    for name, value in one.items():
        assert torch.equal(value.index_select(1 if value.dim() == 3 else 0, order), other[name]), name


def order_of_tape(lengths: Tensor) -> Tensor:
    """The caller's row that stands at each place of the tape."""
    steps, batch = 12, len(lengths)
    made = inputs_of(dataclasses.replace(Case(steps, batch, 4, 64), time=""), 4, torch.float32)
    flags = torch.where(torch.arange(steps)[:, None] < lengths, 0, 2).to(torch.uint8)
    given = [made[name] for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")]
    _y, _h_n, c_n, c, _gates = torch.ops.fastseq.lstm_fwd(*given, None, flags, False, True)
    same = (c[-1, :, None, :64] == c_n).all(-1)  # [place, row]
    assert same.sum() == batch
    return same.int().argmax(1)


def test_mixed_lengths_are_ordered_and_equal_ones_are_not(backend: str, seed: int) -> None:
    if backend == "reference":
        pytest.skip("the order is the C++ kernels'")
    with use_implementation("cpp"):
        lengths = mixed(12, 64)
        order = order_of_tape(lengths)
        assert sorted(order.tolist()) == list(range(64))
        short = (lengths[order] <= 1).int()  # tiles of long and of short ones, not a long and a short row by turns
        assert (short.diff() != 0).sum() < 30 < ((lengths <= 1).int().diff() != 0).sum()
        for plain in (torch.full((64,), 9), torch.sort(lengths, descending=True).values):
            assert torch.equal(order_of_tape(plain), torch.arange(64))
