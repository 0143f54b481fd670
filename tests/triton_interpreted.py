"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference by the one tolerance rule.

Not collected by itself: ``test_triton_interpreter.py`` runs it in a process of its own, where TRITON_INTERPRET=1 was
set before triton was imported. The interpreter runs the programs of a launch one after the other, so where they would
wait for each other there is one of them, or one step. Its bfloat16 is wrong: see ``test_ptx_triton.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from recurrence_cases import CASES, Case, draws_for, draws_of, enlarge, inputs_of, with_options
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import functional as F
from fastseq.kernels import lstm as lstm_kernels
from fastseq.kernels import plan
from fastseq.kernels.launch import Launch
from fastseq.testing import assert_matches_reference, use_implementation

DTYPES = [torch.float32, torch.float16]
OPS = {"lstm": 4, "rnn": 1}
SMALL = [dataclasses.replace(case, P=None) for case in CASES if case.T * case.B < 300]
NONLINEARITIES = ["tanh", "relu", "sigmoid"]
# One program for the persistent regime, as wide as the layer.
PERSISTENT: dict[str, Any] = {"regime": "persistent", "BB": 16, "BH": 64, "groups": 1}
REGIMES: dict[str, dict[str, Any]] = {
    "resident": {"regime": "resident"},
    "persistent": PERSISTENT,
    "persistent-streamed-flags": PERSISTENT | {"held": 0, "sync": "flags"},
    "persistent-held-in-part": PERSISTENT | {"warps": 1, "KC": 16, "held": 1},
    "persistent-in-registers": PERSISTENT | {"warps": 1, "KC": 16, "held": 99, "registers": 2},
    "step": {"regime": "step", "BB": 16, "BH": 16},
    "step-held": {"regime": "step", "BB": 32, "BH": 32, "held": 99, "KC": 16, "depth": 1},
}


# Flags of both kinds, both directions, sizes that fill no tile, more than one tile of the batch.
CORNERS = [Case(4, 17, 3, 40, time="lengths+reset"), Case(3, 5, 4, 45, reverse=True)]


def corner(regime: str, op: str, dtype: torch.dtype, case: Case, seed: int) -> None:
    nonlinearity = NONLINEARITIES[(list(REGIMES).index(regime) + CORNERS.index(case)) % 3]
    with plan.override(**REGIMES[regime]):
        assert_matches_reference(op, draws_for(op, case, dtype, nonlinearity), implementation="triton", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(regime: str, op: str, seed: int) -> None:
    """Of the quick tier each regime with one dtype for either operation, and one corner."""
    turn = list(REGIMES).index(regime) + list(OPS).index(op)
    corner(regime, op, DTYPES[turn % 2], CORNERS[turn // 2 % 2], seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_at_every_corner(regime: str, op: str, dtype: torch.dtype, seed: int) -> None:
    for case in CORNERS:
        corner(regime, op, dtype, case, seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_many_programs_and_one_step(op: str, dtype: torch.dtype, seed: int) -> None:
    """The partition of units and batch over programs; with a single step nobody waits."""
    sync = plan.SYNCS[DTYPES.index(dtype)]
    case = Case(1, 35, 5, 70, time="reset", reverse=sync == "flags")
    with plan.override(regime="persistent", BB=16, BH=32, groups=2, sync=sync):
        assert_matches_reference(op, draws_for(op, case, dtype), implementation="triton", seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_outputs_and_gradients(case: Case, op: str, dtype: torch.dtype, seed: int) -> None:
    """The corners of the CPU's tests, by the regime that the shape would take."""
    for nonlinearity in NONLINEARITIES if op == "rnn" else ["tanh"]:
        assert_matches_reference(op, draws_for(op, case, dtype, nonlinearity), implementation="triton", seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("used", ["y", "h_n"])
def test_unused_outputs(used: str, op: str, seed: int) -> None:
    for case in (Case(3, 3, 4, 9, reverse=True, time="lengths+reset"), Case(1, 1, 1, 1)):
        given = draws_for(op, case, torch.float32)
        assert_matches_reference(op, given, implementation="triton", used={used}, seed=seed)


@pytest.mark.parametrize(
    "regime", [name if name in plan.REGIMES else pytest.param(name, marks=pytest.mark.full) for name in REGIMES]
)
@pytest.mark.parametrize("op", OPS)
def test_large_inputs(op: str, regime: str, seed: int) -> None:
    """Sums of many thousands: tanh and the logistic function are exact there, and nothing is NaN."""
    draws = draws_of(Case(2, 3, 4, 20), OPS[op], torch.float32)
    for draw in draws:
        enlarge(draw, 1e5)
    with plan.override(**REGIMES[regime]):
        assert_matches_reference(op, draws, implementation="triton", seed=seed)
        with use_implementation("triton"):
            y = getattr(F, op)(**draws[0])[0]
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


WAITING = {"item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a device, and so may not be in a CUDA graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in WAITING, f"{func.name()} waits"
        if func.namespace == "fastseq":  # the mode is off in here, and a launcher calls operations of torch
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def capture(op: str, regime: str, case: Case, by_rate: bool) -> None:
    """Forwards and BPTT with every option, where nothing may wait."""
    given = with_options(case, op, torch.float16, by_rate)[0]
    leaves = [value.requires_grad_() for value in given.values() if is_floating(value)]
    with plan.override(regime=regime), use_implementation("triton"), Waits():
        y = getattr(F, op)(**given)[0]
        torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("regime", plan.REGIMES)
@pytest.mark.parametrize("op", OPS)
def test_a_call_may_be_captured_in_a_graph(op: str, regime: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first launch and the last nothing waits for a result."""
    monkeypatch.setattr(Launch, "run", lambda launch: ran.append(launch.kernel.fn.__name__))
    ran: list[str] = []
    case = Case(3, 2, 3, 16, time="reset")
    for by_rate in (False, True):
        capture(op, regime, case, by_rate)
    assert len(ran) == 2 * 2 * (case.T if regime == "step" else 1)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_a_launcher_that_waits_is_found(kernel: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(launch: Launch) -> None:
        if kernel in launch.kernel.fn.__name__:
            value = launch.arguments["h_state" if kernel == "forward" else "dh_state"]
            assert isinstance(value, Tensor)
            value.sum().item()

    monkeypatch.setattr(Launch, "run", run)
    with pytest.raises(AssertionError, match="item waits"):
        capture("lstm", "persistent", Case(3, 2, 3, 16), by_rate=False)


def is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
        inputs["x"].requires_grad_()
        with pytest.raises(RuntimeError, match="do not serve grad_clip"):
            getattr(F, op)(**inputs, grad_clip=1.0)


def test_empty_batch() -> None:
    inputs = inputs_of(Case(3, 1, 4, 5), 4, torch.float32)
    inputs |= {"x": inputs["x"][:, :0], "h0": inputs["h0"][:0], "c0": inputs["c0"][:0]}
    inputs["w_ih"].requires_grad_()
    with use_implementation("triton"):
        y, h_n, c_n = F.lstm(**inputs)
        (grad,) = torch.autograd.grad(y.sum(), inputs["w_ih"])
    assert (y.shape, h_n.shape, c_n.shape) == ((3, 0, 5), (0, 5), (0, 5))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("regime", ["resident", "persistent", "step"])
@pytest.mark.parametrize("op", OPS)
def test_masks_zoneout_and_peepholes(op: str, regime: str, seed: int) -> None:
    """Of the quick tier each regime with one dtype for either operation: forwards or in reverse, by masks or rates."""
    turn = list(REGIMES).index(regime) + list(OPS).index(op)
    case = Case(4, 17, 3, 20, time="lengths+reset", reverse=regime != "persistent")
    given = with_options(case, op, DTYPES[turn % 2], by_rate=regime == "step")
    with plan.override(**REGIMES[regime]):
        assert_matches_reference(op, given, implementation="triton", seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_rate", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("op", OPS)
def test_every_regime_with_options(op: str, regime: str, by_rate: bool, dtype: torch.dtype, seed: int) -> None:
    flags = [Case(4, 17, 3, 20, time="lengths+reset", reverse=reverse) for reverse in (False, True)]
    for case in (*flags, Case(3, 5, 4, 45, reverse=True, bias="none")):
        with plan.override(**REGIMES[regime]):
            given = with_options(case, op, dtype, by_rate)
            assert_matches_reference(op, given, implementation="triton", seed=seed)
