"""Calls past the dispatcher (fastseq.ops.eager): the same numbers, and only where nobody could tell the difference."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from recurrence_cases import Case, inputs_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq.functional as F
from fastseq import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="there are no C++ kernels here")

OPS = {"lstm": 4, "rnn": 1}


def operation(op: str) -> Any:
    return getattr(importlib.import_module(f"fastseq.ops.{op}"), f"_{op}")


def given(op: str) -> dict[str, Any]:
    return inputs_of(Case(5, 4, 7, 9), OPS[op], torch.float32)


def call(op: str, inputs: dict[str, Any]) -> Tensor:
    return getattr(F, op)(**inputs)[0]  # type: ignore[no-any-return]


def with_gradients(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if isinstance(value, Tensor)}
    y = call(op, {**inputs, **leaves})
    return [y.detach(), *torch.autograd.grad((y**2).sum(), list(leaves.values()))]


class Nobody:
    """Stands for the ops: whoever calls one fails."""

    def __call__(self, *args: Any) -> None:
        raise AssertionError("the dispatcher was called")


@contextmanager
def no_dispatcher(op: str) -> Iterator[None]:
    with mock.patch.multiple(operation(op), fwd=Nobody(), bwd=Nobody(), bwd_=Nobody()):
        yield


@pytest.mark.parametrize("op", OPS)
def test_plain_calls_go_past_the_dispatcher_with_the_same_bits(op: str, seed: int) -> None:
    inputs = given(op)
    with no_dispatcher(op):
        assert torch.equal(call(op, inputs), call(op, inputs))
        with torch.inference_mode():
            call(op, {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()})
        direct = with_gradients(op, inputs)
    with mock.patch("fastseq.ops.eager.is_eager", return_value=False):
        dispatched = with_gradients(op, inputs)
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_whoever_listens_is_heard(op: str, seed: int) -> None:
    heard: list[str] = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = given(op)
    for mode in (Dispatched, Called):
        heard.clear()
        with mode():
            with_gradients(op, inputs)
        assert f"fastseq.{op}_fwd.default" in heard, mode
    with torch.profiler.profile() as profile:
        with_gradients(op, inputs)
    names = {event.key for event in profile.key_averages()}
    assert {f"fastseq::{op}_fwd", f"fastseq::{op}_bwd_"} <= names
    # A backward that somebody listens to, of a forward that nobody did.
    leaf = inputs["x"].requires_grad_()
    y = call(op, inputs)
    heard.clear()
    with Dispatched():
        torch.autograd.grad(y.sum(), leaf)
    assert any(name.startswith(f"fastseq.{op}_bwd") for name in heard)


@pytest.mark.parametrize("op", OPS)
def test_tensors_that_do_not_hold_their_numbers(op: str, seed: int) -> None:
    inputs = given(op)
    expected = call(op, inputs)
    negated = {**inputs, "x": torch._neg_view(-inputs["x"])}
    assert negated["x"].is_neg()
    assert torch.equal(call(op, negated), expected)

    class Wrapped(Tensor):
        pass

    wrapped = call(op, {**inputs, "x": inputs["x"].as_subclass(Wrapped)})
    assert torch.equal(wrapped.as_subclass(Tensor), expected)


@pytest.mark.parametrize("op", OPS)
def test_saved_tensors_may_come_back_changed(op: str, seed: int) -> None:
    """Hooks may store what is saved elsewhere, and give back something that only the dispatcher can take."""
    inputs = given(op)
    leaf = inputs["x"].requires_grad_()
    (expected,) = torch.autograd.grad(call(op, inputs).sum(), leaf)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: -saved, torch._neg_view):
        y = call(op, inputs)
    (found,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(found, expected)
