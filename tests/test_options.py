"""The options of lstm and rnn: the reference against loops by hand, every implementation against the reference,
autograd and transforms, combinations of options, and who serves which.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from recurrence_cases import IMPOSSIBLE, OPTIONS, RNN_OPTIONS, Case, draws_of, inputs_of, options_of
from torch import Tensor
from torch.func import grad, vmap

import fastseq
from fastseq import cpu, reference
from fastseq import functional as F
from fastseq.ops import dispatch, transforms
from fastseq.testing import assert_matches_reference, implementations, use_implementation

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALL = [("lstm", name) for name in OPTIONS] + [("rnn", name) for name in RNN_OPTIONS]
TIMES = ["", "lengths", "reset", "lengths+reset"]


def gates_of(op: str) -> int:
    return 4 if op == "lstm" else 1


def serving(op: str, *names: str) -> list[str]:
    """The implementations that serve these options."""
    return implementations(op, options=[OPTIONS[name] for name in names])


def floating(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The floating tensors among the arguments, those in tuples too, by name."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        parts = {f"{name}[{k}]": part for k, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
        found |= {key: part for key, part in parts.items() if isinstance(part, Tensor) and part.is_floating_point()}
    return found


def with_leaves(inputs: dict[str, Any], leaves: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments with these tensors in place of their own."""
    filled = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, tuple):
            filled[name] = tuple(leaves.get(f"{name}[{k}]", part) for k, part in enumerate(value))
        elif name in leaves:
            filled[name] = leaves[name]
    return filled


# The reference against loops by hand, in numpy, written from the published formulas.


def logistic(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def norm(z: Any, weight: Any, bias: Any = 0) -> Any:
    return (z - z.mean()) / np.sqrt(z.var() + 1e-5) * weight + bias


def by_hand(op: str, inputs: dict[str, Any]) -> list[np.ndarray]:
    """One sequence at a time over its valid steps: y and the last states, and for the LSTM all cells and gates."""

    def array(value: Any) -> Any:
        return value.double().numpy() if isinstance(value, Tensor) and value.is_floating_point() else value

    a = {n: tuple(map(array, v)) if isinstance(v, tuple) else array(v) for n, v in inputs.items()}
    T, B, _ = a["x"].shape
    states = [a["h0"].copy(), *([a["c0"].copy()] if op == "lstm" else [])]
    H = states[-1].shape[1]
    y = np.zeros((T, B, states[0].shape[1]))
    cells, gates = np.zeros((T, B, H)), np.zeros((T, B, 4 * H))
    resets = a.get("reset_state")
    resets = resets if isinstance(resets, tuple) or resets is None else (resets,)
    for b in range(B):
        steps = list(range(int(a["lengths"][b]) if a.get("lengths") is not None else T))
        for t in reversed(steps) if a["reverse"] else steps:
            boundary = t + 1 if a["reverse"] else t  # the reset that lies before step t in processing order
            if a.get("reset") is not None and boundary in steps and a["reset"][boundary, b]:
                for k, state in enumerate(states):
                    state[b] = 0 if resets is None else resets[k][(t, b) if resets[k].ndim == 3 else b]
            old = [state[b].copy() for state in states]
            wx, rh = a["w_ih"] @ a["x"][t, b], a["w_hh"] @ (old[0] * (a["h_mask"][b] if "h_mask" in a else 1))
            bias = a.get("b_ih", 0) + a.get("b_hh", 0)
            if op == "rnn":
                states[0][b] = y[t, b] = np.tanh(wx + rh + bias)
                continue
            z = wx + rh + bias
            if "weight_ln_ih" in a:
                z = norm(wx, a["weight_ln_ih"]) + norm(rh, a["weight_ln_hh"]) + bias
            elif "weight_ln_gates" in a:
                z = norm(z, a["weight_ln_gates"], a["bias_ln_gates"])
            zi, zf, zg, zo = z.reshape(4, H)
            p = a.get("peephole", np.zeros((3, H)))
            i, f, g = logistic(zi + p[0] * old[1]), logistic(zf + p[1] * old[1]), np.tanh(zg)
            limit = a.get("cell_clip", np.inf)
            c = np.minimum(np.maximum(f * old[1] + i * g, -limit), limit)
            if "weight_ln_gates" in a:
                c = norm(c, a["weight_ln_c"], a["bias_ln_c"])
            o = logistic(zo + p[2] * c)
            h = o * np.tanh(norm(c, a["weight_ln_c"], a["bias_ln_c"]) if "weight_ln_ih" in a else c)
            h = a["w_hr"] @ h if "w_hr" in a else h
            for k, (name, fresh) in enumerate((("zoneout_h", h), ("zoneout_c", c))):
                keep = a.get(name, 0.0)
                keep = keep[t, b].numpy() if isinstance(keep, Tensor) else keep
                states[k][b] = keep * old[k] + (1 - keep) * fresh
            y[t, b], cells[t, b], gates[t, b] = states[0][b], states[1][b], np.concatenate([i, f, g, o])
    return [y, *states, *([cells, gates] if a.get("return_states") else [])]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("op", "name"), ALL)
def test_reference_is_the_loop_by_hand(op: str, name: str, reverse: bool, seed: int) -> None:
    for time, P in itertools.product(TIMES, (None, 3)):
        case = Case(5, 3, 4, 6, P=P, reverse=reverse, time=time)
        inputs = inputs_of(case, gates_of(op)) | options_of(case, [name], gates_of(op))
        for got, truth in zip(getattr(reference, op)(**inputs), by_hand(op, inputs), strict=True):
            np.testing.assert_allclose(got.numpy(), truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["haste", "torchaudio"])
def test_layer_norm_in_the_words_of_its_library(name: str, seed: int) -> None:
    """The step of haste's LayerNormLSTM and of torchaudio's _CustomLSTM, with torch's ops."""
    case = Case(6, 3, 4, 5, bias="ih" if name == "haste" else "none")
    inputs = inputs_of(case, 4) | options_of(case, [name], 4)
    layer_norm = torch.nn.functional.layer_norm
    h, c, H = inputs["h0"], inputs["c0"], 5
    expected = []
    for x in inputs["x"]:
        wx, rh = x @ inputs["w_ih"].T, h @ inputs["w_hh"].T
        if name == "haste":
            v = layer_norm(wx, (4 * H,), inputs["weight_ln_ih"]) + layer_norm(rh, (4 * H,), inputs["weight_ln_hh"])
            i, f, g, o = (v + inputs["b_ih"]).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * layer_norm(c, (H,), inputs["weight_ln_c"], inputs["bias_ln_c"]).tanh()
        else:
            v = layer_norm(wx + rh, (4 * H,), inputs["weight_ln_gates"], inputs["bias_ln_gates"])
            i, f, g, o = v.chunk(4, 1)
            c = layer_norm(f.sigmoid() * c + i.sigmoid() * g.tanh(), (H,), inputs["weight_ln_c"], inputs["bias_ln_c"])
            h = o.sigmoid() * c.tanh()
        expected.append(h)
    y, h_n, c_n = F.lstm(**inputs)
    for got, truth in ((y, torch.stack(expected)), (h_n, h), (c_n, c)):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)


# Every implementation against the reference.


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("op", "name"), ALL)
def test_outputs_and_gradients(op: str, name: str, seed: int) -> None:
    cases = (
        (Case(6, 3, 4, 65, P=33, time="lengths+reset"), torch.float32),
        (Case(4, 4, 17, 63, reverse=True, time="lengths", strided=True), torch.bfloat16),
    )
    for (case, dtype), implementation in itertools.product(cases, serving(op, name)):
        draws = draws_of(case, gates_of(op), dtype, [name])
        assert_matches_reference(op, draws, implementation=implementation, seed=seed)


# Everything that a kernel can be asked for at once, in several sets since some cannot be combined. All but the first
# make their gates again.
TOGETHER = (
    ("lstm", ("reset_state", "h_mask", "zoneout", "peephole", "cell_clip", "grad_clip", "return_states")),
    ("lstm", ("reset_state per step", "h_mask", "zoneout by rate", "peephole", "grad_clip", "recompute")),
    ("rnn", ("reset_state per step", "h_mask", "grad_clip", "recompute")),
    ("lstm", ("haste", "reset_state per step", "h_mask", "zoneout by rate", "cell_clip", "grad_clip", "recompute")),
    ("lstm", ("torchaudio", "reset_state", "h_mask", "zoneout", "cell_clip", "grad_clip", "return_states")),
)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("op", "names"), TOGETHER, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_instruction_set(op: str, names: tuple[str, ...], isa: str, seed: int) -> None:
    with cpu.use_isa(isa):
        for case, dtype in (
            (Case(5, 7, 6, 33, reverse=True, time="lengths+reset"), torch.float32),
            (Case(3, 2, 5, 18, P=7), torch.float64),
            (Case(3, 4, 5, 17, P=9, time="reset"), torch.float16),
        ):
            draws = draws_of(case, gates_of(op), dtype, names)
            assert_matches_reference(op, draws, implementation="cpp", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("op", "names"), TOGETHER[1:], ids=lambda value: value if isinstance(value, str) else value[0])
def test_gates_made_again_in_several_chunks(op: str, names: tuple[str, ...], seed: int) -> None:
    """More rows of time and batch than a chunk has; the chunks' edges lie elsewhere with every batch size.

    Without the clip of the cell, whose derivative jumps: some of so many cells lie as near to it as float32 rounds, and
    which side they fall on would decide the test.
    """
    names = tuple(name for name in names if name != "cell_clip")
    cases = (
        (Case(7, 201, 6, 20, P=13, time="lengths+reset"), torch.float32),
        (Case(6, 230, 6, 20, reverse=True, time="lengths"), torch.bfloat16),
        (Case(4, 300, 5, 17, reverse=True), torch.float64),
        (Case(3, 600, 5, 17, P=9), torch.float32),
    )
    for case, dtype in cases:
        for chosen in (names, ("recompute",)):
            inputs = inputs_of(case, gates_of(op), dtype) | options_of(case, chosen, gates_of(op), dtype)
            assert_matches_reference(op, inputs, implementation="cpp", seed=seed)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("op", "names"), TOGETHER, ids=lambda value: value if isinstance(value, str) else value[0])
def test_same_bits_for_any_number_of_threads(op: str, names: tuple[str, ...], isa: str, seed: int) -> None:
    def run() -> list[Tensor]:
        outputs = getattr(F, op)(**inputs)
        loss = sum((out**2).sum() for out in outputs)
        return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]

    threads = torch.get_num_threads()
    with use_implementation("cpp"), cpu.use_isa(isa):
        for case in (Case(33, 37, 20, 70), Case(6, 3, 65, 130, P=40, time="lengths+reset")):
            inputs = inputs_of(case, gates_of(op), torch.float32)
            inputs |= options_of(case, names, gates_of(op), torch.float32)
            leaves = {name: value.requires_grad_() for name, value in floating(inputs).items()}
            try:
                torch.set_num_threads(1)
                first = run()
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{case}, {count} threads"
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_recompute_keeps_y_and_c_alone(op: str, seed: int) -> None:
    case = Case(16, 4, 6, 32)
    inputs = inputs_of(case, gates_of(op), torch.float32)
    leaves = [value.requires_grad_() for value in floating(inputs).values()]
    given = {value.data_ptr() for value in leaves}
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.numel() and value.data_ptr() not in given:
            sizes[value.data_ptr()] = value.numel()
        return value

    def kept(**options: Any) -> int:
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            getattr(F, op)(**inputs, **options)
        return sum(sizes.values())

    for implementation in serving(op, "recompute"):
        with use_implementation(implementation):
            one = case.T * case.B * case.H  # H is a whole number of vectors
            assert kept(recompute=True) == (2 if op == "lstm" else 1) * one
            assert kept() > kept(recompute=True) + 0.9 * gates_of(op) * one
            for name in ("haste", "torchaudio") if op == "lstm" else ():  # layer normalisation does so by itself
                norms = options_of(case, [name], 4, torch.float32)
                given |= {value.data_ptr() for value in norms.values()}
                assert kept(**norms) == 2 * one


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("op", "name"), ALL)
def test_every_combination(op: str, name: str, reverse: bool, time: str, dtype: torch.dtype, seed: int) -> None:
    for (T, B, H, P), implementation in itertools.product([(1, 17, 63, None), (9, 2, 130, 33)], serving(op, name)):
        case = Case(T, B, 33, H, P=P, reverse=reverse, time=time)
        draws = draws_of(case, gates_of(op), dtype, [name])
        assert_matches_reference(op, draws, implementation=implementation, seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", [Case(1, 1, 1, 1), Case(3, 5, 4, 1, time="lengths+reset")], ids=str)
@pytest.mark.parametrize(("op", "name"), ALL)
def test_one_unit(op: str, name: str, case: Case, seed: int) -> None:
    """Apart, since tensors of a few numbers take many draws to judge."""
    for implementation in serving(op, name):
        draws = draws_of(case, gates_of(op), torch.float32, [name])
        assert_matches_reference(op, draws, implementation=implementation, seed=seed)


@st.composite
def option_sets(draw: st.DrawFn, op: str) -> list[str]:
    names = draw(
        st.lists(st.sampled_from(list(OPTIONS) if op == "lstm" else list(RNN_OPTIONS)), max_size=5, unique=True)
    )
    kept: list[str] = []
    for name in names:
        if not any(name in pair and pair & set(kept) for pair in IMPOSSIBLE):
            kept.append(name)
    return kept


@settings(max_examples=25)
@given(
    data=st.data(),
    op=st.sampled_from(["lstm", "rnn"]),
    sizes=st.tuples(st.integers(2, 6), st.integers(3, 6), st.integers(4, 8), st.integers(8, 18)),
    P=st.none() | st.integers(4, 9),
    bias=st.sampled_from(["both", "ih", "hh", "none"]),
    reverse=st.booleans(),
    time=st.sampled_from(TIMES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_combinations(
    data: st.DataObject,
    op: str,
    sizes: tuple[int, int, int, int],
    P: int | None,
    bias: str,
    reverse: bool,
    time: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    names = data.draw(option_sets(op))
    case = Case(*sizes, P=P, bias=bias, reverse=reverse, time=time)
    note(f"{op} {case} {dtype} {names}")
    torch.manual_seed(seed)
    draws = draws_of(case, gates_of(op), dtype, names)
    for implementation in serving(op, *names):
        assert_matches_reference(op, draws, implementation=implementation, seed=seed)
    inputs = inputs_of(case, gates_of(op)) | options_of(case, names, gates_of(op))
    for got, truth in zip(getattr(F, op)(**inputs), by_hand(op, inputs), strict=True):
        np.testing.assert_allclose(got.numpy(), truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_every_pair_is_the_loop_by_hand(op: str, seed: int) -> None:
    case = Case(4, 3, 4, 5, P=3, reverse=True, time="lengths+reset")
    for pair in itertools.combinations(OPTIONS if op == "lstm" else RNN_OPTIONS, 2):
        if set(pair) not in IMPOSSIBLE:
            inputs = inputs_of(case, gates_of(op)) | options_of(case, pair, gates_of(op))
            for got, truth in zip(getattr(F, op)(**inputs), by_hand(op, inputs), strict=True):
                np.testing.assert_allclose(got.numpy(), truth, rtol=1e-12, atol=1e-13, err_msg="+".join(pair))


@pytest.mark.parametrize("pair", IMPOSSIBLE[2:], ids=lambda pair: "+".join(sorted(pair)))
def test_combinations_that_make_no_sense_raise_and_say_why(pair: set[str]) -> None:
    case = Case(3, 2, 4, 5)
    with pytest.raises(ValueError, match=r"neither|as haste has it|would not keep"):
        F.lstm(**inputs_of(case, 4) | options_of(case, pair, 4))


# Resets.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_changing_one_episode_alters_no_other(op: str, reverse: bool, seed: int) -> None:
    """Neither forward nor backward, with reset states of its own for every step, which get their gradient alone."""
    T, B = 9, 4
    case = Case(T, B, 5, 17, reverse=reverse)
    inputs = inputs_of(case, gates_of(op), torch.float32)
    inputs |= options_of(case, ["reset_state per step"], gates_of(op), torch.float32)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 0] = reset[7, 0] = reset[4, 1] = reset[0, 2] = reset[8, 3] = True
    inputs["reset"] = reset
    episode = reset.long().cumsum(0)  # [T, B]
    chosen = episode == torch.tensor([1, 0, 1, 0])
    leaves = {name: value.requires_grad_() for name, value in floating(inputs).items()}
    for implementation in serving(op, "reset_state"):
        with use_implementation(implementation):
            function = getattr(F, op)
            before = function(**inputs)[0]
            changed = torch.where(chosen[..., None], torch.randn_like(inputs["x"]), inputs["x"])
            after = function(**inputs | {"x": changed})[0]
            assert torch.equal(before[~chosen], after[~chosen])
            assert not torch.equal(before[chosen], after[chosen])
            grads = dict(zip(leaves, torch.autograd.grad(before[chosen].sum(), list(leaves.values())), strict=True))
    assert (grads["x"][~chosen] == 0).all()
    assert (grads["x"][chosen] != 0).any()
    # The step that takes a reset state, of a chosen episode: the one after the cut in processing order.
    starts = reset if not reverse else torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    for name in ("reset_state[0]", "reset_state[1]") if op == "lstm" else ("reset_state",):
        taken = (grads[name] != 0).any(-1)
        assert torch.equal(taken, starts & chosen)
        assert taken.any()


@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_reset_state_is_what_separate_calls_start_from(op: str, seed: int) -> None:
    """An episode begun by a reset is a call of its own with the reset state as h0; so too when the last step resets."""
    case = Case(7, 3, 4, 6)
    inputs = inputs_of(case, gates_of(op)) | options_of(case, ["reset_state"], gates_of(op))
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[[4, 6]] = True
    whole = getattr(F, op)(**inputs | {"reset": reset})
    states = inputs["reset_state"] if op == "lstm" else (inputs["reset_state"],)
    starts = dict(zip(("h0", "c0"), states, strict=False))
    plain = {name: value for name, value in inputs.items() if not name.startswith("reset")}
    second = getattr(F, op)(**plain | starts | {"x": inputs["x"][4:6]})
    last = getattr(F, op)(**plain | starts | {"x": inputs["x"][6:]})
    torch.testing.assert_close(whole[0][4:], torch.cat([second[0], last[0]]), rtol=1e-12, atol=1e-13)
    for got, truth in zip(whole[1:], last[1:], strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)


def test_poison_does_not_cross_a_reset(seed: int) -> None:
    case = Case(6, 2, 3, 5)
    inputs = inputs_of(case, 4, torch.float32) | options_of(case, ["reset_state", "cell_clip"], 4, torch.float32)
    inputs["x"][2, 0] = float("nan")
    inputs["reset"] = torch.zeros(6, 2, dtype=torch.bool)
    inputs["reset"][3, 0] = True
    y, h_n, c_n = F.lstm(**inputs)
    assert y[2, 0].isnan().all()
    assert not any(value.isnan().any() for value in (y[3:], h_n, c_n))


# The clipped backward.


@pytest.mark.parametrize("op", ["lstm", "rnn"])
@pytest.mark.parametrize("reverse", [False, True])
def test_grad_clip_is_a_hook_at_every_step(op: str, reverse: bool, seed: int) -> None:
    """A loop of single steps, with a hook that clips the whole gradient of each h_t."""
    case = Case(6, 3, 4, 5, reverse=reverse)
    inputs = inputs_of(case, gates_of(op))
    limit, function = 0.1, getattr(F, op)
    leaves = {name: value.requires_grad_() for name, value in floating(inputs).items()}
    fixed = {name: value for name, value in inputs.items() if name not in ("x", "h0", "c0")}
    state = [inputs[name] for name in ("h0", "c0") if name in inputs]
    outputs: list[Any] = [None] * 6
    clipped = 0
    for t in reversed(range(6)) if reverse else range(6):
        named = dict(zip(("h0", "c0"), state, strict=False))
        _, h, *cell = function(x=inputs["x"][t : t + 1], **named, **fixed)

        def hook(gradient: Tensor) -> Tensor:
            nonlocal clipped
            clipped += int((gradient.abs() > limit).sum())
            return gradient.clamp(-limit, limit)

        h.register_hook(hook)
        outputs[t] = h
        state = [h, *cell]
    arriving = [torch.randn_like(value) for value in (torch.stack(outputs), *state)]
    truth = torch.autograd.grad([torch.stack(outputs), *state], list(leaves.values()), arriving)
    assert clipped > 10
    got = torch.autograd.grad(function(**inputs, grad_clip=limit), list(leaves.values()), arriving)
    loose = torch.autograd.grad(function(**inputs, grad_clip=1e9), list(leaves.values()), arriving)
    free = torch.autograd.grad(function(**inputs), list(leaves.values()), arriving)
    for a, b, c, d in zip(got, truth, loose, free, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(c, d, rtol=1e-11, atol=1e-12)
        assert not torch.allclose(a, d)


# Autograd and transforms.


def smooth(op: str, name: str, **sizes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments with one option in float64, and their leaves; clips so wide, or cells so near zero, that none bites."""
    case = Case(3, 2, 2, 3, P=2, **sizes)
    inputs = inputs_of(case, gates_of(op)) | options_of(case, [name], gates_of(op))
    inputs |= {key: 100.0 for key in ("cell_clip", "grad_clip") if key in inputs}
    return inputs, floating(inputs)


def differentiated(op: str, inputs: dict[str, Any], leaves: dict[str, Tensor]) -> tuple[Callable[..., Any], Any]:
    def function(*values: Tensor) -> Any:
        return getattr(F, op)(**with_leaves(inputs, dict(zip(leaves, values, strict=True))))

    return function, tuple(value.detach().clone().requires_grad_() for value in leaves.values())


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.full)], ids=["projected", "whole"])
@pytest.mark.parametrize(("op", "name"), ALL)
def test_gradcheck_and_gradgradcheck(op: str, name: str, fast: bool, seed: int) -> None:
    """Jacobians along random directions, and in the full tier element by element."""
    function, values = differentiated(op, *smooth(op, name, reverse=True, time="lengths+reset"))
    assert torch.autograd.gradcheck(function, values, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=fast)


def test_gradcheck_of_a_clip_that_bites(seed: int) -> None:
    inputs = inputs_of(Case(4, 3, 2, 3), 4)
    inputs["x"] *= 5
    bitten = 0
    for limit in torch.linspace(0.2, 0.6, 20).tolist():
        _, _, _, c, gates = F.lstm(**inputs, cell_clip=limit, return_states=True)
        i, f, g, _ = gates.chunk(4, -1)
        before = f * torch.cat([inputs["c0"][None], c[:-1]]) + i * g  # c as it was before the clip
        if (before.abs() - limit).abs().min() < 1e-4 or not 0.1 < (before.abs() > limit).double().mean() < 0.9:
            continue  # a finite difference would step over the bend, or nothing or everything is clipped
        bitten += 1
        assert torch.autograd.gradcheck(*differentiated("lstm", inputs | {"cell_clip": limit}, floating(inputs)))
        if bitten == 3:
            return
    pytest.fail(f"only {bitten} limits of 20 are far enough from every |c|")


@pytest.mark.parametrize(
    "names",
    [
        ("reset_state per step", "h_mask", "zoneout", "peephole", "cell_clip", "grad_clip", "return_states"),
        ("reset_state", "zoneout by rate", "haste", "recompute"),
        ("torchaudio", "h_mask", "zoneout"),
    ],
    ids=lambda names: names[0],
)
@pytest.mark.parametrize("mapped", ["x", "extras"])
def test_transforms(names: tuple[str, ...], mapped: str, seed: int) -> None:
    """vmap, grad of vmap and vmap of grad, over the input or over the tensors of the options."""
    case = Case(3, 2, 2, 3, P=2, reverse=True, time="lengths+reset")
    inputs = inputs_of(case, 4) | options_of(case, names, 4)
    # The second sequence is whole: it is cut there, and no draw of the masks keeps every gradient from passing.
    inputs["reset"] = torch.tensor([[0, 0], [1, 0], [0, 1]]).bool()
    if "h_mask" in inputs:
        inputs["h_mask"][:, 0] = 1 / 0.7
    for mask in ("zoneout_h", "zoneout_c"):
        if "zoneout" in names:
            inputs[mask][..., 0], inputs[mask][..., 1] = True, False
    leaves = floating(inputs)
    extras = [name for name in leaves if name not in inputs_of(case, 4)]
    chosen = ["x"] if mapped == "x" else extras
    values = tuple(torch.stack([leaves[name], -leaves[name]]) for name in chosen)

    def loss(function: Any) -> Callable[..., Tensor]:
        def of(*values: Tensor) -> Tensor:
            outputs = function(**with_leaves(inputs, dict(zip(chosen, values, strict=True))))
            return sum((out.sin() * (k + 1)).sum() for k, out in enumerate(outputs))  # type: ignore[return-value]

        return of

    every = tuple(range(len(values)))
    for make in (
        lambda loss: vmap(loss)(*values),
        lambda loss: grad(lambda *given: vmap(loss)(*given).sum(), argnums=every)(*values),
        lambda loss: vmap(grad(loss, argnums=every))(*values),
    ):
        got, truth = (torch.utils._pytree.tree_leaves(make(loss(module.lstm))) for module in (F, reference))
        assert len(got) == len(truth) > 0
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            assert b.abs().max() > 0


def compiled_arguments(op: str, names: list[str]) -> dict[str, Any]:
    case = Case(4, 2, 3, 5, time="lengths+reset")
    return inputs_of(case, gates_of(op)) | options_of(case, names, gates_of(op))


@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("lstm", ["reset_state", "zoneout", "peephole", "return_states"]),
        ("lstm", ["haste", "recompute", "h_mask", "grad_clip"]),
        ("rnn", ["reset_state per step", "h_mask", "recompute"]),
    ],
    ids=str,
)
def test_compiled_training(op: str, names: list[str], seed: int) -> None:
    """Forward and backward in one graph without a break."""
    inputs = compiled_arguments(op, names)
    leaves = floating(inputs)

    def run(function: Callable[..., Any]) -> list[Tensor]:
        values = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        outputs = function(**with_leaves(inputs, values))
        return [*outputs, *torch.autograd.grad(sum(out.sin().sum() for out in outputs), list(values.values()))]

    torch._dynamo.reset()
    got = run(torch.compile(getattr(F, op), fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, run(getattr(reference, op)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("requires_grad", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_opcheck(op: str, requires_grad: bool, seed: int) -> None:
    inputs = compiled_arguments(op, ["reset_state", "h_mask"])
    plain = [
        inputs.get(name) for name in ("x", "h0", *(["c0"] if op == "lstm" else []), "w_ih", "w_hh", "b_ih", "b_hh")
    ]
    plain = [value.float().requires_grad_(requires_grad) for value in plain]
    states = inputs["reset_state"] if op == "lstm" else (inputs["reset_state"],)
    extra = [value.float().unsqueeze(0).requires_grad_(requires_grad) for value in states]
    extra.append(inputs["h_mask"].float().requires_grad_(requires_grad))
    flags = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 2]], dtype=torch.uint8)
    if op == "lstm":
        tensors = [*plain, None, flags, *extra, *[None] * 9]
        settings_: list[Any] = [False, 0.1, 0.0, 0.4, 0.2, False]
    else:
        tensors, settings_ = [*plain, flags, *extra], ["relu", True, 0.2, False]
    ops, opcheck = torch.ops.fastseq, torch.library.opcheck
    fwd, bwd, bwd_ = (getattr(ops, f"{op}_options_{name}").default for name in ("fwd", "bwd", "bwd_"))
    for implementation in implementations(op, options=["reset_state", "h_mask", "grad_clip"]):
        with use_implementation(implementation):
            # A kernel leaves columns of its tape undefined, which opcheck would compare.
            opcheck(fwd, (*tensors, *settings_, implementation == "reference"))
            with torch.no_grad():
                results = fwd(*tensors, *settings_, True)
            states_given = 3 if op == "lstm" else 2
            arriving = [torch.randn_like(value) for value in (results if op == "lstm" else results[:2])]
            args = (*arriving, *tensors, results[0], *results[states_given:], *settings_)
            opcheck(bwd, (*args, 31))
            if not requires_grad:
                opcheck(bwd_, (*args, 2))


def test_states_are_not_overwritten_by_the_backward(seed: int) -> None:
    inputs = inputs_of(Case(4, 2, 3, 18), 4, torch.float32)
    leaves = [value.requires_grad_() for value in floating(inputs).values()]
    asked: list[bool] = []
    original = transforms.may_overwrite_tape

    def spy(*args: Any) -> bool:
        asked.append(original(*args))
        return asked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "may_overwrite_tape", spy)
        y, _, _, c, gates = F.lstm(**inputs, return_states=True)
        before = c.detach().clone(), gates.detach().clone()
        torch.autograd.grad(y.sum() + c.sum() + gates.sum(), leaves)
    assert not any(asked)
    assert torch.equal(c, before[0])
    assert torch.equal(gates, before[1])


def test_autocast_rounds_the_options_too(seed: int) -> None:
    case = Case(3, 2, 4, 5)
    names = ["h_mask", "peephole"]
    inputs = inputs_of(case, 4, torch.float32) | options_of(case, names, 4, torch.float32)
    half = {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    expected = F.lstm(**half)
    with torch.autocast("cpu", torch.bfloat16):
        got = F.lstm(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Who serves which option.


def test_info_tells_who_serves_each_option() -> None:
    for op, options in dispatch.OPTIONS.items():
        told = fastseq.info()["ops"][op]["cpu"]["options"]
        assert tuple(told) == options
        served = dispatch.SERVED[("cpp", op)]
        assert all(backend == ("cpp" if option in served else "reference") for option, backend in told.items())
        assert set(fastseq.info()["ops"][op]["cuda"]["options"].values()) == {"reference"}
        with use_implementation("cpp"):
            forced = fastseq.info()["ops"][op]["cpu"]["options"]
        assert all(backend == ("cpp" if option in served else None) for option, backend in forced.items())


@pytest.mark.parametrize(("op", "name"), [pair for pair in ALL if pair[1] in ("haste", "h_mask", "recompute")])
def test_a_forced_kernel_that_lacks_an_option_raises(
    op: str, name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch.SERVED, ("cpp", op), dispatch.SERVED[("cpp", op)] - {OPTIONS[name]})
    case = Case(3, 2, 4, 5)
    inputs = inputs_of(case, gates_of(op), torch.float32) | options_of(case, [name], gates_of(op), torch.float32)
    inputs["w_hh"].requires_grad_()
    assert dispatch.serving(op, options=[OPTIONS[name]])[0] == "reference"
    with use_implementation("cpp"), pytest.raises(RuntimeError, match=f"kernels of {op} do not serve {OPTIONS[name]}"):
        sum(out.sum() for out in getattr(F, op)(**inputs)).backward()


@pytest.mark.parametrize("name", ["grad_clip", "recompute", "return_states"])
def test_options_of_the_backward_cost_no_kernel_without_gradients(name: str, seed: int) -> None:
    case = Case(3, 2, 4, 5)
    inputs = inputs_of(case, 4, torch.float32)
    expected = F.lstm(**inputs)
    with use_implementation("cpp"):
        got = F.lstm(**inputs, **options_of(case, [name], 4, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected, strict=True))


def test_serving_refuses_unknown_options() -> None:
    with pytest.raises(ValueError, match=r"expected some of lengths, reset, .*, got 'gru'"):
        dispatch.serving("lstm", options=["gru"])
    assert dispatch.serving("lstm", options=["lengths", "reset"])[0] == "cpp"


# Bad input.


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("reset_state", torch.zeros(2, 5), TypeError, r"expected a tuple \(h, c\) of tensors, got Tensor"),
        ("reset_state", (torch.zeros(2, 5),), ValueError, "of two tensors, got 1"),
        ("reset_state", (torch.zeros(2, 5), None), TypeError, "expected a Tensor, got NoneType"),
        ("reset_state", (torch.zeros(1, 5), torch.zeros(2, 5)), ValueError, r"\[B, P\] = \[2, 5\] or \[T, B, P\]"),
        (
            "reset_state",
            (torch.zeros(2, 5), torch.zeros(1, 2, 5)),
            ValueError,
            r"\[T, B, H\] = \[3, 2, 5\], got \[1, 2",
        ),
        ("reset_state", (torch.zeros(2, 5), torch.zeros(2, 5).double()), TypeError, "float64"),
        ("h_mask", torch.zeros(3, 2, 5), ValueError, r"\[B, P\] = \[2, 5\], got \[3, 2, 5\]"),
        ("h_mask", torch.zeros(2, 5, dtype=torch.bool), TypeError, "got torch.bool"),
        ("h_mask", [[1.0] * 5] * 2, TypeError, "got list"),
        ("zoneout_h", torch.zeros(3, 2, 5), TypeError, "expected dtype torch.bool, got torch.float32"),
        ("zoneout_h", torch.zeros(2, 5, dtype=torch.bool), ValueError, r"\[T, B, P\] = \[3, 2, 5\], got \[2, 5\]"),
        ("zoneout_c", 1.5, ValueError, "a rate from 0 to 1, got 1.5"),
        ("zoneout_c", "0.1", TypeError, "a rate from 0 to 1, got '0.1'"),
        ("zoneout_c", torch.zeros(3, 2, 5, dtype=torch.bool, device="meta"), TypeError, "device"),
        ("peephole", torch.zeros(4, 5), ValueError, r"\[3, H\] = \[3, 5\], got \[4, 5\]"),
        ("weight_ln_ih", torch.zeros(20), ValueError, "as haste has it"),
        ("bias_ln_c", torch.zeros(5), ValueError, "as torchaudio has it"),
        ("cell_clip", 0.0, ValueError, "a number above 0 or None, got 0.0"),
        ("cell_clip", float("nan"), ValueError, "got nan"),
        ("cell_clip", "1", TypeError, "got '1'"),
        ("grad_clip", -1, ValueError, "got -1"),
        ("grad_clip", True, TypeError, "got True"),
    ],
)
def test_bad_input(name: str, value: Any, error: type[Exception], words: str) -> None:
    inputs = inputs_of(Case(3, 2, 4, 5, time="reset"), 4, torch.float32)
    with pytest.raises(error, match=words) as caught:
        F.lstm(**inputs, **{name: value})
    assert name in str(caught.value)


@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_bad_input_of_both(op: str) -> None:
    case = Case(3, 2, 4, 5)
    inputs, function = inputs_of(case, gates_of(op), torch.float32), getattr(F, op)
    state = options_of(case, ["reset_state"], gates_of(op), torch.float32)["reset_state"]
    with pytest.raises(ValueError, match="reset_state: expected None without reset"):
        function(**inputs, reset_state=state)
    with pytest.raises(ValueError, match="h_mask"):
        function(**inputs, h_mask=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="grad_clip"):
        function(**inputs, grad_clip=0)
    if op == "rnn":
        with pytest.raises(ValueError, match=r"reset_state: expected shape \[B, H\]"):
            function(**inputs, reset_state=state[:1], reset=torch.zeros(3, 2, dtype=torch.bool))


# detach_state.


def test_detach_state() -> None:
    leaf = torch.zeros(2, requires_grad=True)
    made = leaf + 1
    for state in (made, (made, made), [made, (made,)], fastseq.States(made, made, made), None):
        detached = F.detach_state(state)
        assert type(detached) is type(state)
        tensors = torch.utils._pytree.tree_leaves(detached)
        assert all(value is None or (not value.requires_grad and torch.equal(value, made)) for value in tensors)
    with pytest.raises(TypeError, match=r"^state: expected a Tensor, .*, got int"):
        F.detach_state(3)
