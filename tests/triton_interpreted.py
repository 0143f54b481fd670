"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference by the one tolerance rule.

Not collected by itself: ``test_triton_interpreter.py`` runs it in a process of its own, where TRITON_INTERPRET=1 was
set before triton was imported. The interpreter runs the programs of a launch one after the other, so where they would
wait for each other there is one of them, or one step. Its bfloat16 is wrong, so bfloat16 is compiled only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from recurrence_cases import CASES, Case, draws_of, inputs_of
from torch import Tensor

from fastseq import functional as F
from fastseq.kernels import lstm as lstm_kernels
from fastseq.kernels import plan
from fastseq.kernels import rnn as rnn_kernels
from fastseq.ops.flags import step_flags
from fastseq.testing import assert_matches_reference, compare_tensor, use_implementation

DTYPES = [torch.float32, torch.float16]
OPS = {"lstm": 4, "rnn": 1}
SMALL = [dataclasses.replace(case, P=None) for case in CASES if case.T * case.B < 300]
NONLINEARITIES = ["tanh", "relu", "sigmoid"]
# One program for the persistent regime, as wide as the layer.
REGIMES: dict[str, dict[str, Any]] = {
    "resident": {"regime": "resident"},
    "persistent": {"regime": "persistent", "BB": 16, "BH": 64, "groups": 1},
    "persistent-streamed-flags": {
        "regime": "persistent",
        "BB": 16,
        "BH": 64,
        "groups": 1,
        "hold": False,
        "sync": "flags",
    },
    "step": {"regime": "step", "BB": 16, "BH": 16},
    "step-held": {"regime": "step", "BB": 32, "BH": 32, "hold": True, "KC": 16, "depth": 1},
}


def draws(op: str, case: Case, dtype: torch.dtype, nonlinearity: str = "tanh") -> list[dict[str, Any]]:
    extra = {"nonlinearity": nonlinearity} if op == "rnn" else {}
    return [draw | extra for draw in draws_of(case, OPS[op], dtype)]


# Flags of both kinds, both directions, sizes that fill no tile, more than one tile of the batch.
CORNERS = [Case(4, 17, 3, 40, time="lengths+reset"), Case(3, 5, 4, 45, reverse=True)]


def corner(regime: str, op: str, dtype: torch.dtype, case: Case, seed: int) -> None:
    nonlinearity = NONLINEARITIES[(list(REGIMES).index(regime) + CORNERS.index(case)) % 3]
    with plan.override(**REGIMES[regime]):
        assert_matches_reference(op, draws(op, case, dtype, nonlinearity), implementation="triton", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(regime: str, op: str, seed: int) -> None:
    for dtype, case in zip(DTYPES, CORNERS if op == "lstm" else CORNERS[::-1], strict=True):
        corner(regime, op, dtype, case, seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_the_other_way_round(regime: str, op: str, seed: int) -> None:
    for dtype, case in zip(DTYPES, CORNERS if op == "rnn" else CORNERS[::-1], strict=True):
        corner(regime, op, dtype, case, seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_many_programs_and_one_step(op: str, dtype: torch.dtype, seed: int) -> None:
    """The partition of units and batch over programs; with a single step nobody waits."""
    sync = plan.SYNCS[DTYPES.index(dtype)]
    case = Case(1, 35, 5, 70, time="reset", reverse=sync == "flags")
    with plan.override(regime="persistent", BB=16, BH=32, groups=2, sync=sync):
        assert_matches_reference(op, draws(op, case, dtype), implementation="triton", seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_outputs_and_gradients(case: Case, op: str, dtype: torch.dtype, seed: int) -> None:
    """The corners of the CPU's tests, by the regime that the shape would take."""
    for nonlinearity in NONLINEARITIES if op == "rnn" else ["tanh"]:
        assert_matches_reference(op, draws(op, case, dtype, nonlinearity), implementation="triton", seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("used", ["y", "h_n"])
def test_unused_outputs(used: str, op: str, seed: int) -> None:
    for case in (Case(3, 3, 4, 9, reverse=True, time="lengths+reset"), Case(1, 1, 1, 1)):
        given = draws(op, case, torch.float32)
        assert_matches_reference(op, given, implementation="triton", used={used}, seed=seed)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("op", OPS)
def test_large_inputs(op: str, regime: str, seed: int) -> None:
    """Sums of many thousands: tanh and the logistic function are exact there, and nothing is NaN."""
    inputs = inputs_of(Case(2, 3, 4, 20), OPS[op], torch.float32)
    inputs["x"][:, ::2] *= 1e5  # not all rows, or every gradient would be zero
    with plan.override(**REGIMES[regime]):
        assert_matches_reference(op, inputs, implementation="triton", seed=seed)
        with use_implementation("triton"):
            y = getattr(F, op)(**inputs)[0]
    assert torch.isfinite(y).all()
    assert (y.abs() <= 1).all()


@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_every_run(op: str, seed: int) -> None:
    def run() -> list[Tensor]:
        leaves = {n: v.clone().requires_grad_() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        with use_implementation("triton"):
            y = getattr(F, op)(**leaves)[0]
        tensors = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor)]
        return [y.detach(), *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    inputs = inputs_of(Case(3, 5, 4, 20), OPS[op], torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_twice_backward_through_a_kept_graph(seed: int) -> None:
    """The first pass keeps the tape, the second may overwrite it."""
    inputs = inputs_of(Case(3, 2, 4, 16), 4, torch.float32)
    inputs["x"].requires_grad_()
    with use_implementation("triton"):
        y = F.lstm(**inputs)[0].sum()
        (first,) = torch.autograd.grad(y, inputs["x"], retain_graph=True)
        (second,) = torch.autograd.grad(y, inputs["x"])
    assert torch.equal(first, second)


def test_what_the_backend_does_not_serve_is_refused(seed: int) -> None:
    with use_implementation("triton"):
        with pytest.raises(RuntimeError, match="proj_size"):
            F.lstm(**inputs_of(Case(2, 2, 3, 4, P=2), 4, torch.float32))
        with pytest.raises(RuntimeError, match="float64"):
            F.lstm(**inputs_of(Case(2, 2, 3, 4), 4, torch.float64))
        with pytest.raises(RuntimeError, match="float64"):
            F.rnn(**inputs_of(Case(2, 2, 3, 4), 1, torch.float64))
    wrong = inputs_of(Case(2, 2, 3, 4), 4, torch.float32)
    args = [wrong[name] for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")]
    args[2] = args[2][:1]
    with pytest.raises(ValueError, match="c0: the kernel expects"):
        lstm_kernels.lstm_fwd(*args, None, None, False, False)


@pytest.mark.parametrize("op", OPS)
def test_options_that_it_does_not_serve_are_refused_and_the_rest_goes_on(op: str, seed: int) -> None:
    inputs = inputs_of(Case(3, 2, 3, 16, time="reset"), OPS[op], torch.float32)
    with use_implementation("triton"):
        plain = getattr(F, op)(**inputs)
        with torch.no_grad():  # by the operation with options, of which it then uses none
            assert torch.equal(getattr(F, op)(**inputs, recompute=True)[0], plain[0])
        with pytest.raises(RuntimeError, match="do not serve h_mask"):
            getattr(F, op)(**inputs, h_mask=torch.ones_like(inputs["h0"]))


def test_empty_batch() -> None:
    inputs = inputs_of(Case(3, 1, 4, 5), 4, torch.float32)
    inputs |= {"x": inputs["x"][:, :0], "h0": inputs["h0"][:0], "c0": inputs["c0"][:0]}
    inputs["w_ih"].requires_grad_()
    with use_implementation("triton"):
        y, h_n, c_n = F.lstm(**inputs)
        (grad,) = torch.autograd.grad(y.sum(), inputs["w_ih"])
    assert (y.shape, h_n.shape, c_n.shape) == ((3, 0, 5), (0, 5), (0, 5))
    assert torch.equal(grad, torch.zeros_like(grad))


# The options that the launchers take and the public operations do not pass yet, against a loop in plain PyTorch.


def lstm_with_options(
    values: dict[str, Tensor], flags: Tensor | None, masks: dict[str, Tensor], reverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n, c_n; computed in the dtype of ``values``, h rounded to ``dtype``."""
    h, c, steps = values["h0"], values["c0"], values["x"].shape[0]
    ys = [h] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        if flags is not None:
            cut = (flags[t] & 1).bool()[:, None]
            h, c = torch.where(cut, 0.0, h), torch.where(cut, 0.0, c)
        z = values["x"][t] @ values["w_ih"].T + values["b_ih"] + (h * values["h_mask"]) @ values["w_hh"].T
        a_i, a_f, a_g, a_o = (z + values["b_hh"]).chunk(4, 1)
        p = values["peephole"]
        c_new = torch.sigmoid(a_f + p[1] * c) * c + torch.sigmoid(a_i + p[0] * c) * torch.tanh(a_g)
        h_new = torch.sigmoid(a_o + p[2] * c_new) * torch.tanh(c_new)
        h_new = h_new + (h_new.to(dtype).to(h_new.dtype) - h_new).detach()
        h_new, c_new = torch.where(masks["zoneout_h"][t], h, h_new), torch.where(masks["zoneout_c"][t], c, c_new)
        ys[t] = h_new
        if flags is not None:
            pad = (flags[t] & 2).bool()[:, None]
            ys[t] = torch.where(pad, 0.0, h_new)
            h_new, c_new = torch.where(pad, h, h_new), torch.where(pad, c, c_new)
        h, c = h_new, c_new
    return torch.stack(ys), h, c


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["resident", "persistent", "step"])
def test_masks_zoneout_and_peepholes(regime: str, dtype: torch.dtype, seed: int) -> None:
    reverse = regime == "persistent"
    case = Case(4, 17, 3, 20, time="lengths+reset", reverse=reverse)
    inputs = inputs_of(case, 4, dtype)
    flags = step_flags(inputs["lengths"], inputs["reset"], case.T, case.B, reverse, torch.device("cpu"))
    values = {name: v for name, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    values["h_mask"] = ((torch.rand(case.B, case.H) < 0.7) / 0.75).to(dtype)
    values["peephole"] = torch.rand(3, case.H).to(dtype)
    masks = {name: torch.rand(case.T, case.B, case.H) < 0.3 for name in ("zoneout_h", "zoneout_c")}
    arriving = [torch.rand(shape).to(dtype) for shape in ((case.T, case.B, case.H), *((case.B, case.H),) * 2)]

    def by_autograd(compute: torch.dtype) -> dict[str, Tensor]:
        kept = dtype if compute != torch.float64 else torch.float64
        leaves = {name: v.to(compute).requires_grad_(name != "h_mask") for name, v in values.items()}
        outputs = lstm_with_options(leaves, flags, masks, reverse, kept)
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(outputs, list(asked.values()), [grad.to(compute) for grad in arriving])
        found = dict(zip(("y", "h_n", "c_n"), outputs, strict=True)) | {
            f"d{name}": grad for name, grad in zip(asked, grads, strict=True)
        }
        return {name: v.detach().to(kept) for name, v in found.items()}

    truth, ref = by_autograd(torch.float64), by_autograd(torch.float32)
    order = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
    args = [*(values[name] for name in order), None, flags]
    options = {"h_mask": values["h_mask"], "peephole": values["peephole"], **masks}
    with plan.override(**REGIMES[regime]):
        y, h_n, c_n, c, gates = lstm_kernels.lstm_fwd(*args, reverse, True, **options)
        grads = lstm_kernels.lstm_bwd(*arriving, *args, y, c, gates, reverse, 7, **options)
    dx, dh0, dc0, dw_ih, dw_hh, db, _, dp = grads
    got = {"y": y, "h_n": h_n, "c_n": c_n, "dx": dx, "dh0": dh0, "dc0": dc0, "dw_ih": dw_ih, "dw_hh": dw_hh}
    got |= {"db_ih": db, "db_hh": db, "dpeephole": dp}
    assert got.keys() == truth.keys()
    wrong = [str(c) for name in got if not (c := compare_tensor(name, got[name], ref[name], truth[name])).ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["resident", "persistent", "step"])
def test_mask_on_the_state_of_an_elman_layer(regime: str, dtype: torch.dtype, seed: int) -> None:
    inputs = inputs_of(Case(4, 17, 3, 20), 1, dtype)
    values = {name: inputs[name] for name in ("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh")}
    mask = ((torch.rand(17, 20) < 0.7) / 0.75).to(dtype)
    arriving = torch.rand(4, 17, 20).to(dtype)

    def by_autograd(compute: torch.dtype) -> dict[str, Tensor]:
        kept = dtype if compute != torch.float64 else torch.float64
        leaves = {name: v.to(compute).requires_grad_() for name, v in values.items()}
        h, ys = leaves["h0"], []
        for x in leaves["x"]:
            sums = x @ leaves["w_ih"].T + leaves["b_ih"] + (h * mask.to(compute)) @ leaves["w_hh"].T + leaves["b_hh"]
            value = torch.tanh(sums)
            h = value + (value.to(kept).to(compute) - value).detach()
            ys.append(h)
        y = torch.stack(ys)
        grads = torch.autograd.grad(y, list(leaves.values()), arriving.to(compute))
        found = {"y": y} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {name: v.detach().to(kept) for name, v in found.items()}

    truth, ref = by_autograd(torch.float64), by_autograd(torch.float32)
    args = [*values.values(), None]
    with plan.override(**REGIMES[regime]):
        y, _, slopes = rnn_kernels.rnn_fwd(*args, "tanh", False, True, h_mask=mask)
        grads = rnn_kernels.rnn_bwd(arriving, None, *args, y, slopes, "tanh", False, 7, h_mask=mask)
    names = ("y", "dx", "dh0", "dw_ih", "dw_hh", "db_ih", "db_hh")
    got = dict(zip(names, (y, *grads, grads[-1]), strict=True))
    wrong = [str(c) for name in got if not (c := compare_tensor(name, got[name], ref[name], truth[name])).ok]
    assert not wrong, "\n".join(wrong)
