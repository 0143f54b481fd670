"""PyTorch's own samples for its recurrent modules (``ModuleInfo``), run against fastseq's: results and errors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from nn_support import TWINS, Draw, assert_same, assert_twins_agree, tensors, twins
from torch import nn
from torch.testing._internal.common_modules import (
    ModuleErrorEnum,
    module_db,
    module_inputs_torch_nn_RNN_GRU,
)

INFOS = {info.module_cls: info for info in module_db if info.module_cls in TWINS}


@pytest.fixture(autouse=True)
def from_one_seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.config.getoption("--seed") or 0)


def samples(torch_class: type[nn.Module], dtype: torch.dtype, training: bool = True) -> list[Any]:
    """PyTorch's samples; called again, the same ones with other numbers."""
    return list(
        INFOS[torch_class].module_inputs_func(
            INFOS[torch_class], device="cpu", dtype=dtype, requires_grad=True, training=training
        )
    )


def packed_samples(dtype: torch.dtype) -> list[Any]:
    """PyTorch's samples of packed sequences, likewise. They are its RNN's."""
    made = module_inputs_torch_nn_RNN_GRU(
        INFOS[nn.RNN], "cpu", dtype, requires_grad=True, training=True, with_packed_sequence=True, is_rnn=True
    )
    return [sample for sample in made if isinstance(sample.forward_input.args[0], nn.utils.rnn.PackedSequence)]


def pair(torch_class: type[nn.Module], sample: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Both modules from the sample's constructor arguments, with the same weights."""
    made = sample.constructor_input
    return twins(torch_class, *made.args, **{**made.kwargs, "dtype": dtype})


def assert_samples_agree(
    torch_class: type[nn.Module], make: Callable[[], list[Any]], dtype: torch.dtype, every: int = 1
) -> None:
    """Each sample that make gives, or one of ``every`` so many, over as many draws as it takes: the samples at its
    place in further lists."""
    lists = [make()]

    def draw(index: int, turns: Iterator[int]) -> Draw:
        turn = next(turns)
        if turn == len(lists):
            lists.append(make())
        sample, first = lists[turn][index], lists[0][index]
        assert sample.constructor_input.kwargs == first.constructor_input.kwargs
        assert not sample.forward_input.kwargs
        return *pair(torch_class, sample, dtype), sample.forward_input.args

    for index in range(0, len(lists[0]), every):
        assert_twins_agree(partial(draw, index, itertools.count()), dtype)


def test_torch_has_samples_for_every_twin() -> None:
    assert INFOS.keys() == TWINS.keys()
    assert len(samples(nn.LSTM, torch.float64)) >= 32
    assert len(samples(nn.RNN, torch.float64)) >= 32


# float32 takes many draws of each sample, float64 a few: the quick tier has one sample of eight in float32.
EVERY = [
    pytest.param(torch.float64, 1, id="torch.float64"),
    pytest.param(torch.float32, 8, id="torch.float32-some"),
    pytest.param(torch.float32, 1, id="torch.float32", marks=pytest.mark.full),
]


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "every"), EVERY)
@pytest.mark.parametrize("torch_class", TWINS, ids=lambda cls: cls.__name__)
def test_outputs_and_gradients_of_every_sample(torch_class: type[nn.Module], dtype: torch.dtype, every: int) -> None:
    assert_samples_agree(torch_class, lambda: samples(torch_class, dtype), dtype, every)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "every"), EVERY)
@pytest.mark.parametrize("torch_class", [nn.LSTM, nn.RNN], ids=lambda cls: cls.__name__)
def test_outputs_and_gradients_of_every_packed_sample(
    torch_class: type[nn.Module], dtype: torch.dtype, every: int
) -> None:
    def make() -> list[Any]:
        packed = packed_samples(dtype)
        if torch_class is nn.LSTM:  # PyTorch has none for it; those of the RNN serve, one half of them
            packed = [each for each in packed if each.constructor_input.kwargs.pop("nonlinearity") == "tanh"]
        return packed

    assert len(make()) >= (32 if torch_class is nn.RNN else 16)
    assert_samples_agree(torch_class, make, dtype, every)


@pytest.mark.parametrize("torch_class", TWINS, ids=lambda cls: cls.__name__)
def test_unbatched_equals_a_batch_of_one(torch_class: type[nn.Module]) -> None:
    """Each sample's own reference function, which adds a batch axis and takes it away again."""
    for sample in samples(torch_class, torch.float64):
        _, ours = pair(torch_class, sample, torch.float64)
        args = sample.forward_input.args
        direct, through = tensors(ours(*args)), tensors(sample.reference_fn(ours, *args))
        assert all(torch.equal(one, other) for one, other in zip(direct, through, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("torch_class", TWINS, ids=lambda cls: cls.__name__)
def test_train_and_eval_without_gradients(torch_class: type[nn.Module], training: bool) -> None:
    for sample in samples(torch_class, torch.float64, training):
        theirs, ours = (module.train(training) for module in pair(torch_class, sample, torch.float64))
        with torch.no_grad():
            expected, got = (tensors(module(*sample.forward_input.args)) for module in (theirs, ours))
        assert_same(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("torch_class", TWINS, ids=lambda cls: cls.__name__)
def test_every_error_sample_raises_what_torch_raises(torch_class: type[nn.Module], dtype: torch.dtype) -> None:
    info = INFOS[torch_class]
    errors = list(info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True))
    assert len(errors) >= 4
    for error in errors:
        made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                TWINS[torch_class](*made.args, **made.kwargs)
            continue
        # The samples of the cells are of `dtype` too; those of the layers are meant to differ from the weights.
        options = made.kwargs if "dtype" in made.kwargs else {**made.kwargs, "dtype": given.args[0].dtype}
        module = TWINS[torch_class](*made.args, **options)
        with pytest.raises(error.error_type, match=error.error_regex) as caught:
            module(*given.args, **given.kwargs)
        assert re.search(r"\d|dtype", str(caught.value)), "the message says what came"
