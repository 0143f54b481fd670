"""Random inputs for the tests of the recurrences, and the shapes and options that between them meet every corner."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastseq import reference

reference_rnn: Any = import_module("fastseq.reference.rnn")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Every time structure in the dtypes of the arithmetic; half types, which differ in how they are stored, with all of it.
DTYPES_AND_TIMES = [
    *((dtype, time) for dtype in DTYPES[:2] for time in ("", "lengths", "reset", "lengths+reset")),
    *((dtype, "lengths+reset") for dtype in DTYPES[2:]),
]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call. ``time`` is any of "lengths" and "reset", joined by "+"."""

    T: int
    B: int
    I: int
    H: int
    P: int | None = None
    bias: str = "both"  # both, ih, hh, none
    reverse: bool = False
    time: str = ""
    strided: bool = False

    def __str__(self) -> str:
        parts = [f"T{self.T}B{self.B}I{self.I}H{self.H}"]
        parts += [f"P{self.P}"] if self.P else []
        parts += [f"bias-{self.bias}"] if self.bias != "both" else []
        parts += ["reverse"] * self.reverse + ([self.time] if self.time else []) + ["strided"] * self.strided
        return "-".join(parts)


# Each option meets several sizes, and each size (one, odd, just beyond a vector, large) several options. Plain layers
# of up to 16 rows of time and batch read the weights as they lie, all others packed ones.
CASES = [
    Case(1, 1, 1, 1),
    Case(1, 1, 1, 1, P=1, reverse=True, time="lengths+reset"),
    Case(1, 4, 7, 63, bias="ih"),
    Case(5, 3, 4, 1, bias="hh", time="reset"),
    Case(19, 1, 5, 65, reverse=True),
    Case(8, 2, 5, 65, reverse=True),
    Case(2, 7, 1100, 20, bias="none"),
    Case(4, 4, 65, 48, strided=True),
    Case(6, 1, 3, 16, time="lengths", strided=True),
    Case(5, 5, 2, 130, bias="none"),
    Case(7, 4, 65, 63, time="lengths+reset"),
    Case(7, 4, 65, 63, time="lengths+reset", reverse=True, strided=True),
    Case(4, 17, 130, 65, P=33),
    Case(9, 6, 8, 20, P=7, reverse=True, time="reset", bias="none"),
    Case(9, 6, 8, 20, P=7, time="lengths+reset", strided=True),
    Case(12, 9, 3, 32, reverse=True, time="lengths", bias="ih"),
    Case(40, 33, 16, 48, strided=True),
]


def strided_copy(value: Tensor) -> Tensor:
    """The same numbers, with gaps between them and the dimensions stored in another order."""
    order = list(range(value.dim()))[::-1]
    wide = torch.full([2 * size for size in value.permute(order).shape], 7, dtype=value.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in order)].permute(order)
    view.copy_(value)
    return view


def time_options(case: Case) -> dict[str, Any]:
    """``lengths`` with a zero and a full one where there is room, and ``reset`` with a third of the steps set."""
    options: dict[str, Any] = {}
    if "lengths" in case.time:
        lengths = torch.randint(0, case.T + 1, (case.B,))
        lengths[0] = 0
        lengths[-1] = case.T
        options["lengths"] = lengths
    if "reset" in case.time:
        options["reset"] = torch.rand(case.T, case.B) < 0.3
    return options


def inputs_of(case: Case, gates: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments by name: of lstm with ``gates=4``, of rnn with ``gates=1``.

    All numbers are bounded: an outlier now and then would decide a whole test by itself. So are the sums that meet the
    activations: weights are drawn as torch.nn initialises them, in ±1/sqrt(H), but no wider than ±1/sqrt of the numbers
    that they sum. One unit over 65 inputs would else saturate, or its recurrence be chaotic, and the worst-conditioned
    draw would decide by luck. What saturates has tests of its own.
    """
    state = case.H if case.P is None or gates == 1 else case.P

    def made_of(value: Tensor) -> Tensor:
        return strided_copy(value.to(dtype)) if case.strided else value.to(dtype)

    def random(*shape: int) -> Tensor:
        return made_of(2 * torch.rand(shape, dtype=torch.float64) - 1)

    def weight(*shape: int) -> Tensor:
        bound = max(4, case.H, shape[-1] if len(shape) > 1 else 0) ** -0.5
        return made_of(bound * (2 * torch.rand(shape, dtype=torch.float64) - 1))

    made: dict[str, Any] = {"x": random(case.T, case.B, case.I), "h0": random(case.B, state)}
    if gates == 4:
        made["c0"] = random(case.B, case.H)
    made["w_ih"] = weight(gates * case.H, case.I)
    made["w_hh"] = weight(gates * case.H, state)
    if case.bias in ("both", "ih"):
        made["b_ih"] = weight(gates * case.H)
    if case.bias in ("both", "hh"):
        made["b_hh"] = weight(gates * case.H)
    if gates == 4 and case.P is not None:
        made["w_hr"] = weight(case.P, case.H)
    return made | {"reverse": case.reverse} | time_options(case)


# What each option adds to the arguments, and the option of fastseq.ops.dispatch that it is.
OPTIONS = {
    "reset_state": "reset_state",
    "reset_state per step": "reset_state",
    "h_mask": "h_mask",
    "zoneout": "zoneout",
    "zoneout by rate": "zoneout",
    "peephole": "peephole",
    "haste": "layer_norm",
    "torchaudio": "layer_norm",
    "cell_clip": "cell_clip",
    "grad_clip": "grad_clip",
    "recompute": "recompute",
    "return_states": "return_states",
}
RNN_OPTIONS = ("reset_state", "reset_state per step", "h_mask", "grad_clip", "recompute")

# Pairs that cannot be used together.
IMPOSSIBLE = (
    {"reset_state", "reset_state per step"},
    {"zoneout", "zoneout by rate"},
    {"haste", "torchaudio"},
    {"peephole", "haste"},
    {"peephole", "torchaudio"},
    {"recompute", "return_states"},
)


def options_of(case: Case, names: Iterable[str], gates: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of the options named (keys of :data:`OPTIONS`), with ``reset`` where they need one."""
    P = case.H if case.P is None or gates == 1 else case.P

    def random(*shape: int) -> Tensor:
        value = (2 * torch.rand(shape, dtype=torch.float64) - 1).to(dtype)
        return strided_copy(value) if case.strided else value

    made: dict[str, Any] = {}
    names = tuple(names)
    for name in names:
        if name.startswith("reset_state"):
            lead = (case.T,) if name.endswith("per step") else ()
            states = random(*lead, case.B, P), random(*lead, case.B, case.H)
            made["reset_state"] = states if gates == 4 else states[0]
            if "reset" not in case.time:
                made["reset"] = torch.rand(case.T, case.B) < 0.3
        elif name == "h_mask":
            kept = torch.rand(case.B, P) < 0.7
            if "haste" in names:  # R h of one unit or none is narrow, and normalising multiplies its rounding
                kept[:, ::2] = True
            made["h_mask"] = kept.to(dtype) / 0.7
        elif name == "zoneout":
            made["zoneout_h"] = torch.rand(case.T, case.B, P) < 0.3
            made["zoneout_c"] = torch.rand(case.T, case.B, case.H) < 0.3
        elif name == "zoneout by rate":
            made |= {"zoneout_h": 0.3, "zoneout_c": 0.2}
        elif name == "peephole":
            made["peephole"] = random(3, case.H)
        elif name in ("haste", "torchaudio"):
            stems = ("weight_ln_ih", "weight_ln_hh") if name == "haste" else ("weight_ln_gates", "bias_ln_gates")
            made |= {stem: random(4 * case.H) for stem in stems}
            made |= {stem: random(case.H) for stem in ("weight_ln_c", "bias_ln_c")}
            # Cells of a narrow spread are multiplied by its inverse at every step: the recurrence would be chaotic.
            made["weight_ln_c"] = made["weight_ln_c"] / 2
        elif name == "cell_clip" and ("haste" in names or "torchaudio" in names):
            # Where nearly all cells lie at the limit, their variance is next to nothing, and normalising multiplies
            # every rounding.
            made[name] = 0.9
        elif name.endswith("_clip"):
            made[name] = 0.3
        else:
            made[name] = True
    return made


def draws_of(case: Case, gates: int, dtype: torch.dtype, options: Collection[str] = ()) -> list[dict[str, Any]]:
    """Enough draws of the inputs that no tensor judged, all draws together, has fewer than 256 numbers."""

    def draw() -> dict[str, Any]:
        return inputs_of(case, gates, dtype) | options_of(case, options, gates, dtype)

    first = draw()
    smallest = min(v.numel() for v in first.values() if isinstance(v, Tensor) and v.is_floating_point())
    return [first, *(draw() for _ in range(1, -(-256 // smallest)))]


def enlarge(inputs: dict[str, Any], factor: float) -> None:
    """Makes one number large in every second row of x, where gates saturate; in all rows, every gradient would be zero.

    Of several in a row the sums would here and there cancel, and what is left be wrong by chance. It is a number with
    which every gate saturates, if need be larger than by ``factor``: a slope that is nearly zero has few digits, and
    times such an x they would all be seen.
    """
    rows = inputs["x"][:, ::2]
    sure = rows.abs() * inputs["w_ih"].abs().amin(0)  # by column: the gate that saturates least
    enough = (100 / sure.amax(-1, keepdim=True)).clamp(factor, torch.finfo(rows.dtype).max / 2)
    rows *= enough * torch.nn.functional.one_hot(sure.argmax(-1), rows.shape[-1])


def rnn_draws_of(case: Case, nonlinearity: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """:func:`draws_of` for rnn with that nonlinearity.

    Where relu's argument is as small as its rounding error its sign is anyone's, and with it whole gradients: no draw
    has such arguments, but in float64, where they do not happen.
    """
    made = [draw | {"nonlinearity": nonlinearity} for draw in draws_of(case, 1, dtype)]
    if nonlinearity == "relu" and dtype != torch.float64:
        for draw in made:
            _keep_from_the_kink(draw)
    return made


def draws_for(op: str, case: Case, dtype: torch.dtype, nonlinearity: str = "tanh") -> list[dict[str, Any]]:
    """:func:`draws_of` for "lstm", or :func:`rnn_draws_of` for "rnn"."""
    return rnn_draws_of(case, nonlinearity, dtype) if op == "rnn" else draws_of(case, 4, dtype)


def with_options(case: Case, op: str, dtype: torch.dtype, by_rate: bool) -> list[dict[str, Any]]:
    """Draws that use all options that the Triton kernels serve: zoneout by rates, or by masks."""
    found = draws_for(op, case, dtype)
    for inputs in found:
        inputs["h_mask"] = ((torch.rand(case.B, case.H) < 0.7) / 0.75).to(dtype)
        if op == "lstm":
            inputs["peephole"] = torch.rand(3, case.H).to(dtype)
            for name, rate in (("zoneout_h", 0.25), ("zoneout_c", 0.4)):
                inputs[name] = rate if by_rate else torch.rand(case.T, case.B, case.H) < rate
    return found


def _keep_from_the_kink(draw: dict[str, Any]) -> None:
    """Draws rows of x anew until every argument of relu is so far from zero that nobody who keeps to the rule of
    fastseq.testing gives it another sign: twice as far as the reference in this dtype is ever off, and some rounding.
    """
    x = draw["x"]
    while True:
        exact, rounded = _arguments_of_relu(draw, torch.float64), _arguments_of_relu(draw, x.dtype)
        error = (rounded - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        near = (exact.abs() < 2 * error).any(-1)
        if not near.any():
            return
        near &= near.cumsum(0) == 1  # a sequence's first: what follows depends on it
        rows = near.flip(0) if draw["reverse"] else near
        x[rows] = (2 * torch.rand(int(rows.sum()), x.shape[-1], dtype=torch.float64) - 1).to(x.dtype)


def _arguments_of_relu(draw: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """What the reference applies relu to, computing in ``dtype``: [T, B, H] in float64, in the order of the steps."""
    arguments: list[Tensor] = []

    def relu(a: Tensor) -> Tensor:
        arguments.append(a.double())
        return torch.relu(a)

    given = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in draw.items()
    }
    with mock.patch.dict(reference_rnn.NONLINEARITIES, relu=relu):
        reference.rnn(**given)
    assert len(arguments) == draw["x"].shape[0]
    return torch.stack(arguments)
