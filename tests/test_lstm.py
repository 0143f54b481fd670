"""lstm: every implementation against the float64 reference, and the reference against torch and a loop by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from recurrence_cases import CASES, DTYPES, DTYPES_AND_TIMES, Case, draws_of, enlarge, inputs_of
from torch import Tensor, nn

from fastseq import cpu, reference
from fastseq import functional as F
from fastseq.testing import assert_matches_reference, compare, implementations, use_implementation


def test_cpp_kernels_run_here() -> None:
    assert implementations("lstm") == ["reference", "cpp"], cpu.why_unavailable()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype, backend: str, seed: int) -> None:
    assert_matches_reference("lstm", draws_of(case, 4, dtype), implementation=backend, seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(2, 11, 3, 725, time="lengths+reset"), torch.float32),
        (Case(2, 8, 3, 513, reverse=True), torch.float64),
        pytest.param(Case(2, 7, 3, 1030, P=515), torch.float32, marks=pytest.mark.full),
        *(pytest.param(Case(3, B, 20, 725), torch.float32, marks=pytest.mark.full) for B in range(7, 14)),
    ],
    ids=str,
)
def test_weights_beyond_the_second_level_cache(case: Case, dtype: torch.dtype, backend: str, seed: int) -> None:
    """Of more than 8 MiB: a batch of up to twelve is then one tall tile."""
    assert_matches_reference("lstm", draws_of(case, 4, dtype), implementation=backend, seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("dtype", "time"), DTYPES_AND_TIMES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("H", [1, 65, 130])
@pytest.mark.parametrize(("T", "B"), [(1, 65), (9, 1), (8, 63)])
def test_every_combination(
    T: int, B: int, H: int, projected: bool, reverse: bool, time: str, dtype: torch.dtype, backend: str, seed: int
) -> None:
    case = Case(T, B, 65, H, P=(H + 1) // 2 if projected else None, reverse=reverse, time=time)
    assert_matches_reference("lstm", draws_of(case, 4, dtype), implementation=backend, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reach", [1.0, 20.0, 200.0])
def test_saturated_gates(reach: float, dtype: torch.dtype, backend: str, seed: int) -> None:
    """One unit whose gates all see x itself: the activations alone are judged, near zero, far out and beyond."""
    B = 1000
    x = reach * torch.linspace(-1, 1, B, dtype=dtype).reshape(1, B, 1)
    h0, c0 = torch.zeros(B, 1, dtype=dtype), (2 * torch.rand(B, 1, dtype=torch.float64) - 1).to(dtype)
    given = {"x": x, "h0": h0, "c0": c0, "w_ih": torch.ones(4, 1, dtype=dtype), "w_hh": torch.zeros(4, 1, dtype=dtype)}
    for result in compare("lstm", given, implementation=backend, used={"y", "c_n"}, seed=seed):
        assert result.ok or result.name not in ("y", "c_n", "dx", "dc0"), result  # the weights': one sum that cancels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_units_pass_nothing_on(dtype: torch.dtype, backend: str, seed: int) -> None:
    """x of 10^5: what is left of a slope would be seen in dw_ih."""
    draws = draws_of(Case(2, 3, 4, 20), 4, dtype)
    for draw in draws:
        enlarge(draw, 1e5)
    assert_matches_reference("lstm", draws, implementation=backend, seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("used", [{"y"}, {"h_n"}, {"c_n"}, {"y", "c_n"}], ids=lambda used: "+".join(sorted(used)))
def test_unused_outputs(used: set[str], backend: str, seed: int) -> None:
    for case in (Case(5, 3, 4, 9, P=4), Case(5, 3, 4, 9, reverse=True, time="lengths+reset"), Case(1, 1, 1, 1)):
        draws = draws_of(case, 4, torch.float32)
        assert_matches_reference("lstm", draws, implementation=backend, used=used, seed=seed)


@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"])
def test_one_gradient_alone_is_the_same(wanted: str, backend: str, seed: int) -> None:
    inputs = inputs_of(Case(4, 3, 5, 18, P=6, time="reset"), 4, torch.float32)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    for value in tensors.values():
        value.requires_grad_()
    everything = dict(zip(tensors, torch.autograd.grad(F.lstm(**inputs)[0].sum(), list(tensors.values())), strict=True))
    alone = {name: value.detach().requires_grad_(name == wanted) for name, value in tensors.items()}
    (grad,) = torch.autograd.grad(F.lstm(**inputs | alone)[0].sum(), alone[wanted])
    assert torch.equal(grad, everything[wanted])


@settings(max_examples=40)
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (9, 20, 20, 70))),
    P=st.none() | st.integers(1, 40),
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
    P: int | None,
    bias: str,
    reverse: bool,
    time: str,
    strided: bool,
    dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    case = Case(*sizes, P=P, bias=bias, reverse=reverse, time=time, strided=strided)
    note(f"{case} {dtype} {isa}")
    torch.manual_seed(seed)
    with cpu.use_isa(isa):
        assert_matches_reference("lstm", draws_of(case, 4, dtype), implementation="cpp", seed=seed)


def test_empty_batch(backend: str) -> None:
    inputs = inputs_of(Case(3, 1, 4, 5), 4, torch.float32)
    inputs |= {"x": inputs["x"][:, :0], "h0": inputs["h0"][:0], "c0": inputs["c0"][:0]}
    inputs["w_ih"].requires_grad_()
    y, h_n, c_n = F.lstm(**inputs)
    assert (y.shape, h_n.shape, c_n.shape) == ((3, 0, 5), (0, 5), (0, 5))
    (grad,) = torch.autograd.grad(y.sum(), inputs["w_ih"])
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.isas())
def test_same_bits_on_every_run_and_for_any_number_of_threads(isa: str, dtype: torch.dtype, seed: int) -> None:
    def run() -> list[Tensor]:
        inputs = {n: v.detach().requires_grad_() if v.is_floating_point() else v for n, v in given.items()}
        outputs = F.lstm(**inputs)
        leaves = [value for value in inputs.values() if value.requires_grad]
        return [*outputs, *torch.autograd.grad(sum((out**2).sum() for out in outputs), leaves)]

    threads = torch.get_num_threads()
    with use_implementation("cpp"), cpu.use_isa(isa):
        cases = [
            Case(6, 37, 20, 70),
            Case(6, 3, 65, 130, P=40, time="lengths+reset"),
            Case(25, 1, 3, 8),
            Case(3, 5, 70, 130),
        ]
        cases += [Case(3, 9, 3, 725)] if dtype == torch.float32 else []  # one tall tile
        for case in cases:
            given = {n: v for n, v in inputs_of(case, 4, dtype).items() if isinstance(v, Tensor)}
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
    inputs = inputs_of(Case(T, B, 5, 17, reverse=reverse), 4, torch.float32)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 0] = reset[7, 0] = reset[4, 1] = reset[0, 2] = reset[8, 3] = True
    episode = reset.long().cumsum(0)  # [T, B]
    chosen = episode == torch.tensor([1, 0, 1, 0])
    x = inputs.pop("x")
    before = F.lstm(x, reset=reset, **inputs)[0]
    changed = torch.where(chosen[..., None], torch.randn_like(x), x)
    after = F.lstm(changed, reset=reset, **inputs)[0]
    assert torch.equal(before[~chosen], after[~chosen])
    assert not torch.equal(before[chosen], after[chosen])

    x.requires_grad_()
    y = F.lstm(x, reset=reset, **inputs)[0]
    (grad,) = torch.autograd.grad(y[chosen].sum(), x)
    assert (grad[~chosen] == 0).all()
    assert (grad[chosen] != 0).any()


def test_poison_does_not_cross_a_reset_or_enter_from_padding(backend: str) -> None:
    """A NaN before a reset stays there, and what stands in the padding is never read into a result."""
    inputs = inputs_of(Case(6, 2, 3, 5), 4, torch.float32)
    inputs["x"][2, 0] = float("nan")
    inputs["x"][4:, 1] = float("nan")
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True
    y, h_n, c_n = F.lstm(**inputs, reset=reset, lengths=torch.tensor([6, 4]))
    assert y[2, 0].isnan().all()
    assert not y[3:].isnan().any()
    assert (y[4:, 1] == 0).all()
    assert not h_n.isnan().any()
    assert not c_n.isnan().any()


# The reference itself.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("proj", [0, 3])
def test_reference_is_torch_lstm(proj: int, bias: bool, seed: int) -> None:
    """Both directions, outputs and gradients, in float64."""
    T, B, I, H = 6, 3, 4, 5
    module = nn.LSTM(I, H, bias=bias, proj_size=proj, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, B, proj or H, dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(2, B, H, dtype=torch.float64, requires_grad=True)
    y, (h_n, c_n) = module(x, (h0, c0))
    expected = (*y.chunk(2, dim=-1), h_n[0], h_n[1], c_n[0], c_n[1])
    got: list[list[Tensor]] = []
    for direction, suffix in enumerate(["", "_reverse"]):
        names = ["weight_ih_l0", "weight_hh_l0", *(["bias_ih_l0", "bias_hh_l0"] if bias else [])]
        weights = [getattr(module, name + suffix) for name in names]
        w_hr = getattr(module, "weight_hr_l0" + suffix) if proj else None
        got.append(list(reference.lstm(x, h0[direction], c0[direction], *weights, w_hr=w_hr, reverse=direction == 1)))
    mine = tuple(out for pair in zip(*got, strict=True) for out in pair)
    leaves = [x, h0, c0, *module.parameters()]
    arriving = [torch.randn_like(out) for out in expected]
    grads = torch.autograd.grad(expected, leaves, arriving), torch.autograd.grad(mine, leaves, arriving)
    for truth, value in zip((*expected, *grads[0]), (*mine, *grads[1]), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13)


def by_hand(inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The LSTM in numpy, one sequence at a time over its valid steps only, with episodes as separate runs."""
    a = {n: v.double().numpy() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    T, B, _ = a["x"].shape
    H = a["c0"].shape[1]
    h_n, c_n = a["h0"].copy(), a["c0"].copy()
    y = np.zeros((T, B, h_n.shape[1]))
    for b in range(B):
        steps = list(range(int(a["lengths"][b]) if a.get("lengths") is not None else T))
        for position, t in enumerate(reversed(steps) if a["reverse"] else steps):
            boundary = t + 1 if a["reverse"] else t  # the reset that lies before step t in processing order
            if a.get("reset") is not None and boundary in steps and a["reset"][boundary, b]:
                assert position > 0 or not a["reverse"]
                h_n[b], c_n[b] = 0, 0
            z = a["w_ih"] @ a["x"][t, b] + a["w_hh"] @ h_n[b] + a.get("b_ih", 0) + a.get("b_hh", 0)
            i, f, o = (1 / (1 + np.exp(-z[k * H : (k + 1) * H])) for k in (0, 1, 3))
            c_n[b] = f * c_n[b] + i * np.tanh(z[2 * H : 3 * H])
            h = o * np.tanh(c_n[b])
            y[t, b] = h_n[b] = a["w_hr"] @ h if "w_hr" in a else h
    return y, h_n, c_n


@pytest.mark.parametrize("case", [case for case in CASES if case.time], ids=str)
def test_reference_is_the_loop_by_hand(case: Case, seed: int) -> None:
    inputs = inputs_of(case, 4)
    for got, truth in zip(reference.lstm(**inputs), by_hand(inputs), strict=True):
        np.testing.assert_allclose(got.numpy(), truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_derivatives(reverse: bool, seed: int) -> None:
    inputs = inputs_of(Case(4, 3, 2, 3, P=2, reverse=reverse, time="lengths+reset"), 4)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    leaves = tuple(inputs.pop(name).requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        lambda *args: reference.lstm(**dict(zip(names, args, strict=True)), **inputs), leaves
    )


def test_half_reference_rounds_h_only(seed: int) -> None:
    """In bfloat16 the cell state is float32: a sum that bfloat16 could not hold survives many steps."""
    T, B, H = 400, 1, 1
    zeros = torch.zeros(4 * H, 1, dtype=torch.bfloat16)
    bias = torch.tensor([-5.0, 20.0, 20.0, 20.0], dtype=torch.bfloat16)  # i small, f = 1, g = 1, o = 1
    state = torch.zeros(B, H, dtype=torch.bfloat16)
    x = torch.zeros(T, B, 1, dtype=torch.bfloat16)
    for implementation in implementations("lstm"):
        with use_implementation(implementation):
            c_n = F.lstm(x, state, state, zeros, zeros, bias)[2]
        assert c_n.dtype == torch.bfloat16
        assert abs(c_n.item() - T * torch.sigmoid(torch.tensor(-5.0)).item()) < 0.02
