"""rnn: every implementation against the float64 reference, and the reference against torch and a loop by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from recurrence_cases import CASES, DTYPES, DTYPES_AND_TIMES, Case, enlarge, inputs_of, rnn_draws_of
from torch import Tensor, nn

from fastseq import cpu, reference
from fastseq import functional as F
from fastseq.testing import assert_matches_reference, compare, implementations, use_implementation

NONLINEARITIES = ["tanh", "relu", "sigmoid"]
RNN_CASES = [dataclasses.replace(case, P=None) for case in CASES]


def test_cpp_kernels_run_here() -> None:
    assert implementations("rnn") == ["reference", "cpp"], cpu.why_unavailable()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("index", "case"), list(enumerate(RNN_CASES)), ids=str)
def test_outputs_and_gradients(index: int, case: Case, dtype: torch.dtype, backend: str, seed: int) -> None:
    # Each nonlinearity meets every option: the cases are more than three to each, in no order of three.
    nonlinearity = NONLINEARITIES[(index + DTYPES.index(dtype)) % 3]
    assert_matches_reference("rnn", rnn_draws_of(case, nonlinearity, dtype), implementation=backend, seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(2, 11, 3, 1450, time="lengths+reset"), torch.float32),
        pytest.param(Case(2, 7, 3, 1029, reverse=True), torch.float64, marks=pytest.mark.full),
        *(pytest.param(Case(3, B, 20, 1465), torch.float32, marks=pytest.mark.full) for B in range(8, 13)),
    ],
    ids=str,
)
def test_weights_beyond_the_second_level_cache(case: Case, dtype: torch.dtype, backend: str, seed: int) -> None:
    """Of more than 8 MiB: a batch of up to twelve is then one tall tile."""
    assert_matches_reference("rnn", rnn_draws_of(case, "tanh", dtype), implementation=backend, seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("dtype", "time"), DTYPES_AND_TIMES, ids=str)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("H", [1, 65, 130])
@pytest.mark.parametrize(("T", "B"), [(1, 65), (9, 1), (8, 63)])
def test_every_combination(
    T: int, B: int, H: int, reverse: bool, time: str, nonlinearity: str, dtype: torch.dtype, backend: str, seed: int
) -> None:
    case = Case(T, B, 65, H, reverse=reverse, time=time)
    assert_matches_reference("rnn", rnn_draws_of(case, nonlinearity, dtype), implementation=backend, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reach", [1.0, 20.0, 200.0])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_saturated_units(nonlinearity: str, reach: float, dtype: torch.dtype, backend: str, seed: int) -> None:
    """One unit that sees x itself, so that the activation alone is judged: near zero, far out and beyond."""
    B = 1000
    x = reach * torch.linspace(-1, 1, B, dtype=dtype).reshape(1, B, 1)
    one, none = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    given = {"x": x, "h0": none.expand(B, 1), "w_ih": one, "w_hh": none, "nonlinearity": nonlinearity}
    for result in compare("rnn", given, implementation=backend, seed=seed):
        assert result.ok or result.name not in ("y", "dx"), result  # the weight's gradient: one sum that cancels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
def test_saturated_units_pass_nothing_on(nonlinearity: str, dtype: torch.dtype, backend: str, seed: int) -> None:
    """x of 10^5: what is left of a slope would be seen in dw_ih."""
    draws = rnn_draws_of(Case(2, 3, 4, 20), nonlinearity, dtype)
    for draw in draws:
        enlarge(draw, 1e5)
    assert_matches_reference("rnn", draws, implementation=backend, seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("used", ["y", "h_n"])
def test_unused_outputs(used: str, backend: str, seed: int) -> None:
    for case in (Case(5, 3, 4, 9), Case(5, 3, 4, 9, reverse=True, time="lengths+reset"), Case(1, 1, 1, 1)):
        given = rnn_draws_of(case, "tanh", torch.float32)
        assert_matches_reference("rnn", given, implementation=backend, used={used}, seed=seed)


@pytest.mark.parametrize("wanted", ["x", "h0", "w_ih", "w_hh", "b_ih", "b_hh"])
def test_one_gradient_alone_is_the_same(wanted: str, backend: str, seed: int) -> None:
    inputs = inputs_of(Case(4, 3, 5, 18, time="reset"), 1, torch.float32)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    for value in tensors.values():
        value.requires_grad_()
    everything = dict(zip(tensors, torch.autograd.grad(F.rnn(**inputs)[0].sum(), list(tensors.values())), strict=True))
    alone = {name: value.detach().requires_grad_(name == wanted) for name, value in tensors.items()}
    (grad,) = torch.autograd.grad(F.rnn(**inputs | alone)[0].sum(), alone[wanted])
    assert torch.equal(grad, everything[wanted])


@settings(max_examples=40)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (9, 20, 20, 70))),
    nonlinearity=st.sampled_from(NONLINEARITIES),
    bias=st.sampled_from(["both", "ih", "hh", "none"]),
    reverse=st.booleans(),
    time=st.sampled_from(["", "lengths", "reset", "lengths+reset"]),
    strided=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(cpu.isas()),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(
    sizes: tuple[int, int, int, int],
    nonlinearity: str,
    bias: str,
    reverse: bool,
    time: str,
    strided: bool,
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    case = Case(*sizes, bias=bias, reverse=reverse, time=time, strided=strided)
    note(f"{case} {nonlinearity} {dtype} {isa}")
    torch.manual_seed(seed)
    with cpu.use_isa(isa):
        assert_matches_reference("rnn", rnn_draws_of(case, nonlinearity, dtype), implementation="cpp", seed=seed)


def test_empty_batch(backend: str) -> None:
    inputs = inputs_of(Case(3, 1, 4, 5), 1, torch.float32)
    inputs |= {"x": inputs["x"][:, :0], "h0": inputs["h0"][:0]}
    inputs["w_ih"].requires_grad_()
    y, h_n = F.rnn(**inputs)
    assert (y.shape, h_n.shape) == ((3, 0, 5), (0, 5))
    (grad,) = torch.autograd.grad(y.sum(), inputs["w_ih"])
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("isa", cpu.isas())
def test_same_bits_on_every_run_and_for_any_number_of_threads(isa: str, nonlinearity: str, seed: int) -> None:
    def run() -> list[Tensor]:
        inputs = {n: v.detach().requires_grad_() if v.is_floating_point() else v for n, v in given.items()}
        outputs = F.rnn(**inputs, nonlinearity=nonlinearity)
        leaves = [value for value in inputs.values() if value.requires_grad]
        return [*outputs, *torch.autograd.grad(sum((out**2).sum() for out in outputs), leaves)]

    threads = torch.get_num_threads()
    with use_implementation("cpp"), cpu.use_isa(isa):
        for case in (
            Case(6, 37, 20, 70),
            Case(6, 3, 65, 130, time="lengths+reset"),
            Case(25, 1, 3, 8),
            Case(3, 5, 70, 260),
        ):
            given = {n: v for n, v in inputs_of(case, 1, torch.float32).items() if isinstance(v, Tensor)}
            try:
                torch.set_num_threads(1)
                first = run()
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{case}, {count} threads"
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("reverse", [False, True])
def test_changing_one_episode_alters_no_other(reverse: bool, backend: str, seed: int) -> None:
    T, B = 9, 4
    inputs = inputs_of(Case(T, B, 5, 17, reverse=reverse), 1, torch.float32)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 0] = reset[7, 0] = reset[4, 1] = reset[0, 2] = reset[8, 3] = True
    episode = reset.long().cumsum(0)  # [T, B]
    chosen = episode == torch.tensor([1, 0, 1, 0])
    x = inputs.pop("x")
    before = F.rnn(x, reset=reset, **inputs)[0]
    after = F.rnn(torch.where(chosen[..., None], torch.randn_like(x), x), reset=reset, **inputs)[0]
    assert torch.equal(before[~chosen], after[~chosen])
    assert not torch.equal(before[chosen], after[chosen])

    x.requires_grad_()
    (grad,) = torch.autograd.grad(F.rnn(x, reset=reset, **inputs)[0][chosen].sum(), x)
    assert (grad[~chosen] == 0).all()
    assert (grad[chosen] != 0).any()


# The reference itself.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_reference_is_torch_rnn(nonlinearity: str, bias: bool, seed: int) -> None:
    """Both directions, outputs and gradients, in float64."""
    T, B, I, H = 6, 3, 4, 5
    module = nn.RNN(I, H, nonlinearity=nonlinearity, bias=bias, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, B, H, dtype=torch.float64, requires_grad=True)
    y, h_n = module(x, h0)
    expected = (*y.chunk(2, dim=-1), h_n[0], h_n[1])
    got = []
    for direction, suffix in enumerate(["", "_reverse"]):
        names = ["weight_ih_l0", "weight_hh_l0", *(["bias_ih_l0", "bias_hh_l0"] if bias else [])]
        weights = [getattr(module, name + suffix) for name in names]
        got.append(reference.rnn(x, h0[direction], *weights, nonlinearity=nonlinearity, reverse=direction == 1))
    mine = tuple(out for pair in zip(*got, strict=True) for out in pair)
    leaves = [x, h0, *module.parameters()]
    arriving = [torch.randn_like(out) for out in expected]
    grads = torch.autograd.grad(expected, leaves, arriving), torch.autograd.grad(mine, leaves, arriving)
    for truth, value in zip((*expected, *grads[0]), (*mine, *grads[1]), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13)


def by_hand(inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The logistic network in numpy, one sequence at a time over its valid steps only."""
    a = {n: v.double().numpy() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    T, B, _ = a["x"].shape
    h_n = a["h0"].copy()
    y = np.zeros((T, B, h_n.shape[1]))
    for b in range(B):
        steps = list(range(int(a["lengths"][b]) if a.get("lengths") is not None else T))
        for t in reversed(steps) if a["reverse"] else steps:
            boundary = t + 1 if a["reverse"] else t  # the reset that lies before step t in processing order
            if a.get("reset") is not None and boundary in steps and a["reset"][boundary, b]:
                h_n[b] = 0
            z = a["w_ih"] @ a["x"][t, b] + a["w_hh"] @ h_n[b] + a.get("b_ih", 0) + a.get("b_hh", 0)
            y[t, b] = h_n[b] = 1 / (1 + np.exp(-z))
    return y, h_n


@pytest.mark.parametrize("case", [RNN_CASES[2], *(case for case in RNN_CASES if case.time)], ids=str)
def test_reference_is_the_loop_by_hand(case: Case, seed: int) -> None:
    inputs = inputs_of(case, 1)
    for got, truth in zip(reference.rnn(**inputs, nonlinearity="sigmoid"), by_hand(inputs), strict=True):
        np.testing.assert_allclose(got.numpy(), truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("reverse", [False, True])
def test_reference_derivatives(reverse: bool, nonlinearity: str, seed: int) -> None:
    inputs = inputs_of(Case(4, 3, 2, 3, reverse=reverse, time="lengths+reset"), 1)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    leaves = tuple(inputs.pop(name).requires_grad_() for name in names)

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        return reference.rnn(**dict(zip(names, args, strict=True)), nonlinearity=nonlinearity, **inputs)

    assert torch.autograd.gradcheck(function, leaves)
