"""Sequences of mixed lengths, which the C++ kernels take in order of length, against the float64 reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrence_cases import DTYPES, OPTIONS, RNN_OPTIONS, Case, draws_of, inputs_of
from torch import Tensor
from torch.func import grad, jacrev, vmap

from fastseq import cpu, reference
from fastseq import functional as F
from fastseq.ops.tape import ANY_ORDER, KEEP
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


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("op", "option"), [*(("lstm", name) for name in OPTIONS), *(("rnn", name) for name in RNN_OPTIONS)]
)
def test_one_option_each(op: str, option: str, backend: str, seed: int) -> None:
    """Some are known to the forward alone, some to the backward alone, and one hands the tape to the caller."""
    case = Case(8, 101, 5, 65 if op == "lstm" else 260, time="lengths")
    draws = [draw | {"lengths": mixed(case.T, case.B)} for draw in draws_of(case, GATES[op], torch.float32, (option,))]
    assert_matches_reference(op, draws, implementation=backend, seed=seed)


def of_each(loss: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Any:
    """Of each of 3 samples, each a batch of sequences: their gradients, weights included."""
    return vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(torch.stack([x, -x, x / 2]), weight)


def through_vmap(loss: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Any:
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = vmap(loss, in_dims=(0, None))(torch.stack([leaves[0], -leaves[0]]), leaves[1])
    return torch.autograd.grad(losses.sqrt().sum(), leaves)


def in_a_batch(loss: Callable[..., Tensor], x: Tensor, weight: Tensor, *, of_weight: bool = True) -> Any:
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    arriving = torch.arange(1, 4).to(x)
    return torch.autograd.grad(loss(*leaves), leaves[: 1 + of_weight], arriving, is_grads_batched=True)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap of grad": of_each,
    "backward through vmap": through_vmap,
    "gradients in a batch": in_a_batch,
    "gradients of x in a batch": lambda *args: in_a_batch(*args, of_weight=False),
    "jacrev": lambda loss, *args: jacrev(lambda x, w: torch.stack([loss(x, w), loss(2 * x, w)]), argnums=(0, 1))(*args),
    "jacrev twice": lambda loss, x, w: jacrev(jacrev(lambda w: loss(x, w)[None]))(w[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", GATES)
def test_transforms(op: str, transform: str, backend: str, seed: int) -> None:
    """A tape in another order comes to no backward that would take it apart."""
    twice = transform == "jacrev twice"
    case = Case(4, 70, 3, 6 if twice else 160 // GATES[op])
    inputs = inputs_of(case, GATES[op], torch.float64) | {"lengths": mixed(case.T, case.B)}
    row = torch.zeros(len(inputs["w_hh"]), 1, dtype=torch.float64).index_fill_(0, torch.tensor(0), 1)

    def loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def of(x: Tensor, w_hh: Tensor) -> Tensor:
            weight = inputs["w_hh"] + row * w_hh if w_hh.dim() == 1 else w_hh
            y, *_ = function(**inputs | {"x": x, "w_hh": weight})
            return (y * y).sum()

        return of

    got = TRANSFORMS[transform](loss(getattr(F, op)), inputs["x"], inputs["w_hh"])
    truth = TRANSFORMS[transform](loss(getattr(reference, op)), inputs["x"], inputs["w_hh"])
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


def test_a_backward_goes_by_the_tape(seed: int) -> None:
    """And not by what it would choose itself: the two may run in other instruction sets, with other tiles."""
    case = Case(6, 32, 5, 64)
    inputs = inputs_of(case, 4, torch.float32) | {"lengths": mixed(case.T, case.B)}
    inputs["x"].requires_grad_()
    arriving = torch.randn(case.T, case.B, case.H)
    y, *_ = reference.lstm(**inputs)
    (truth,) = torch.autograd.grad(y, inputs["x"], arriving)
    with use_implementation("cpp"):
        for first in cpu.isas():
            for second in cpu.isas():
                with cpu.use_isa(first), cpu.use_split_rows(1):
                    y, *_ = F.lstm(**inputs)
                with cpu.use_isa(second):
                    (dx,) = torch.autograd.grad(y, inputs["x"], arriving)
                torch.testing.assert_close(dx, truth, rtol=1e-4, atol=1e-5, msg=f"{first}, then {second}")


def tape_of(lengths: Tensor, save: int) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The inputs of a layer with H = 64 and the results of its forward, tape included."""
    steps, batch = 12, len(lengths)
    made = inputs_of(dataclasses.replace(Case(steps, batch, 4, 64), time=""), 4, torch.float32)
    flags = torch.where(torch.arange(steps)[:, None] < lengths, 0, 2).to(torch.uint8)
    given = [*(made[name] for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")), None, flags]
    return given, torch.ops.fastseq.lstm_fwd(*given, False, save)


def order_of_tape(lengths: Tensor, save: int = ANY_ORDER) -> Tensor:
    """The caller's row that stands at each place of the tape."""
    _, (_y, _h_n, c_n, c, gates) = tape_of(lengths, save)
    same = (c[-1, :, None, :64] == c_n).all(-1)  # [place, row]
    assert same.sum() == len(lengths)
    order = same.int().argmax(1)
    assert torch.equal(gates[0, :, 4 * 64] + torch.arange(len(lengths)), order)
    return order


def test_mixed_lengths_are_ordered_and_equal_ones_are_not(backend: str, seed: int) -> None:
    if backend == "reference":
        pytest.skip("the order is the C++ kernels'")
    rows = 80  # of which two threads have more than a tile each, whatever the instruction set
    with use_implementation("cpp"):
        lengths = mixed(12, rows)
        order = order_of_tape(lengths)
        assert sorted(order.tolist()) == list(range(rows))
        short = (lengths[order] <= 1).int()  # tiles of long and of short ones, not a long and a short row by turns
        assert (short.diff() != 0).sum() < 30 < ((lengths <= 1).int().diff() != 0).sum()
        for plain in (torch.full((rows,), 9), torch.sort(lengths, descending=True).values):
            assert torch.equal(order_of_tape(plain), torch.arange(rows))
        assert torch.equal(order_of_tape(lengths, KEEP), torch.arange(rows))


def test_a_tape_that_is_none_is_refused(backend: str, seed: int) -> None:
    if backend == "reference":
        pytest.skip("the order is the C++ kernels'")
    with use_implementation("cpp"):
        given, (y, _h_n, _c_n, c, gates) = tape_of(mixed(12, 64), ANY_ORDER)
        for wrong in (64.0, -65.0, float("nan"), float("inf")):
            spoilt = gates.clone()
            spoilt[0, 5, 4 * 64] = wrong
            with pytest.raises(ValueError, match="the tape is not one that a forward of this layer left"):
                torch.ops.fastseq.lstm_bwd(y, None, None, *given, y, c, spoilt, False, 1)
        spoilt = gates.clone()
        spoilt[0, :, 4 * 64] = -torch.arange(64.0)  # the same row 64 times
        with pytest.raises(ValueError, match="the tape is not one"):
            torch.ops.fastseq.lstm_bwd(y, None, None, *given, y, c, spoilt, False, 1)
