"""Forwards in one piece (fastseq.nn.inference): the bits of the general way, and only where it is as plain as that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from nn_support import tensors
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="there are no C++ kernels here")

MODULES: dict[str, Callable[[], Any]] = {
    "lstm": lambda: fastseq.LSTM(7, 9),
    "three layers": lambda: fastseq.LSTM(7, 9, 3),
    "projection": lambda: fastseq.LSTM(7, 9, 2, proj_size=5),
    "projection, no bias": lambda: fastseq.LSTM(7, 9, 2, bias=False, proj_size=5),
    "no bias": lambda: fastseq.LSTM(7, 19, 2, bias=False),
    "batch first": lambda: fastseq.LSTM(7, 9, 2, batch_first=True),
    "dropout in evaluation": lambda: fastseq.LSTM(7, 9, 2, dropout=0.5).eval(),
    "rnn": lambda: fastseq.RNN(7, 33, 2),
    "relu": lambda: fastseq.RNN(7, 9, nonlinearity="relu"),
    "sigmoid, no bias": lambda: fastseq.RNN(7, 9, 2, nonlinearity="sigmoid", bias=False),
    "converted": lambda: fastseq.convert(nn.LSTM(7, 9, 2), keep_type=True),
}


def is_whole(module: Any, *args: Any) -> bool:
    """Whether this call went in one piece."""
    with mock.patch.object(type(module), "_stack", autospec=True, side_effect=type(module)._stack) as general:
        module(*args)
    return not general.called


def states_of(module: Any, *lead: int) -> Any:
    dtype = next(module.parameters()).dtype
    states = tuple(torch.randn(module.num_layers, *lead, width, dtype=dtype) for width in module._state_sizes())
    return states if len(states) == 2 else states[0]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_the_bits_of_the_general_way(name: str, dtype: torch.dtype, seed: int) -> None:
    module = MODULES[name]().to(dtype)
    with torch.no_grad():
        for T, B in ((1, 1), (6, 3), (5, 33)):
            lead = (B, T) if module.batch_first else (T, B)
            wide = torch.randn(*lead, module.input_size + 3, dtype=dtype)
            calls = [(wide[..., :-3].contiguous(),), (wide[..., :-3], states_of(module, B))]
            calls += [(torch.randn(B, T, module.input_size, dtype=dtype).transpose(0, 1),)] * (not module.batch_first)
            calls += [(torch.randn(T, module.input_size, dtype=dtype), states_of(module))]
            for args in calls:
                before = [value.clone() for value in tensors(args)]
                found = tensors(module(*args))
                assert is_whole(module, *args)
                assert all(torch.equal(a, b) for a, b in zip(before, tensors(args), strict=True))
                with mock.patch("fastseq.nn.inference.run", return_value=None):
                    expected = tensors(module(*args))
                for one, other in zip(found, expected, strict=True):
                    assert torch.equal(one, other)
                    assert one.stride() == other.stride()


def test_of_inference_tensors_and_frozen_weights(seed: int) -> None:
    module = fastseq.LSTM(7, 9)
    with torch.inference_mode():
        assert is_whole(module, torch.randn(4, 3, 7))
    assert not is_whole(module, torch.randn(4, 3, 7))
    module.requires_grad_(False)
    assert is_whole(module, torch.randn(4, 3, 7))
    assert not is_whole(module, torch.randn(4, 3, 7, requires_grad=True))
    assert not is_whole(module, torch.randn(4, 3, 7), (torch.zeros(1, 3, 9), torch.zeros(1, 3, 9, requires_grad=True)))


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@torch.no_grad()
def test_what_is_not_plain_goes_the_general_way(seed: int) -> None:
    x = torch.randn(4, 3, 8)
    for module in (
        fastseq.LSTM(8, 9, bidirectional=True),
        fastseq.LSTM(8, 9, 2, dropout=0.5),
        fastseq.LSTM(8, 9, peephole=True),
        fastseq.LSTM(8, 9, zoneout=0.1).eval(),
        fastseq.LSTM(8, 9, layer_norm="haste"),
        fastseq.LSTM(8, 9, cell_clip=1.0),
        fastseq.RNN(8, 9, recurrent_dropout=0.5),
    ):
        assert not is_whole(module, x)
    module = fastseq.LSTM(8, 9)
    assert is_whole(module, x)
    with Recorder():
        assert not is_whole(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_whole(module, x)
    with fastseq.testing.use_implementation("reference"):
        assert not is_whole(module, x)
    assert not is_whole(module, torch.randn(4, 3, 16)[..., ::2])
    assert not is_whole(module, torch.randn(4, 0, 8))
    assert not is_whole(module, torch._neg_view(x))

    module.weight_hh_l0.data = module.weight_hh_l0.data.t().contiguous().t()
    assert not is_whole(module, x)
    module = fastseq.LSTM(8, 9)
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    assert not is_whole(module, x)


@torch.no_grad()
def test_arguments_of_a_call_do_not_stay(seed: int) -> None:
    """Weights that functional_call puts in place are those that are used, and only in that call."""
    module, other = fastseq.LSTM(8, 9, 2), fastseq.LSTM(8, 9, 2)
    x = torch.randn(4, 3, 8)
    before = module(x)[0]
    replaced = torch.func.functional_call(module, dict(other.named_parameters()), (x,))[0]
    assert torch.equal(replaced, other(x)[0])
    assert torch.equal(module(x)[0], before)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "words"),
    [("weight_ih_l0", "w_ih"), ("weight_hh_l1", "w_hh"), ("bias_ih_l0", "b_ih"), ("weight_hr_l1", "w_h")],
)
def test_a_weight_of_another_size_is_refused(name: str, words: str) -> None:
    """Not read past its end."""
    module = fastseq.LSTM(8, 9, 2, proj_size=5)
    weight = getattr(module, name)
    weight.data = weight.data[:-1]
    with pytest.raises(fastseq.ShapeError, match=words):
        module(torch.randn(4, 3, 8))
