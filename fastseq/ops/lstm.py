"""The operation lstm, one layer in one direction over the whole sequence: checks, schemas and fakes.

It is two operations of ``torch.ops.fastseq``: ``lstm_fwd``, ``lstm_bwd`` for the plain layer and step flags, and
``lstm_options_fwd``, ``lstm_options_bwd`` with all options, so that the plain call does not pay for arguments that it
does not have. The kernels are :mod:`fastseq.reference.lstm` (every device) and :mod:`fastseq.cpu.lstm` (C++);
:mod:`fastseq.ops.dispatch` knows who serves which option.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.cpu import lstm as kernels
from fastseq.ops.checks import (
    autocast_dtype,
    check_kinds,
    check_limits,
    check_reset_state,
    check_shapes,
    check_zoneout,
    pair_of,
    refuse_shape,
    under_autocast,
)
from fastseq.ops.flags import checked_flags
from fastseq.ops.needs import NEEDS_MASK, NEEDS_RESET, NEEDS_STATE, NEEDS_WEIGHTS, NEEDS_X
from fastseq.ops.operation import NO_BATCH, Operand, Operation, Result
from fastseq.ops.tape import accumulate_dtype, states_of, tape_shapes
from fastseq.reference.lstm import Options as Options  # for the layers too
from fastseq.reference.lstm import lstm_bwd as reference_bwd
from fastseq.reference.lstm import lstm_fwd as reference_fwd
from fastseq.reference.lstm import lstm_options_bwd as reference_options_bwd
from fastseq.reference.lstm import lstm_options_fwd as reference_options_fwd

_OPTIONAL = frozenset(("b_ih", "b_hh", "w_hr"))

# The parameters of layer normalisation, and which of them each form has.
_GATE_NORMS = "weight_ln_ih", "weight_ln_hh", "weight_ln_gates", "bias_ln_gates"
_CELL_NORMS = "weight_ln_c", "bias_ln_c"
_HASTE = frozenset((*_GATE_NORMS[:2], *_CELL_NORMS))
_TORCHAUDIO = frozenset((*_GATE_NORMS[2:], *_CELL_NORMS))

_OPTION_WEIGHTS = ("peephole", *_GATE_NORMS, *_CELL_NORMS)


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | float | None = None,
    zoneout_c: Tensor | float | None = None,
    weight_ln_ih: Tensor | None = None,
    weight_ln_hh: Tensor | None = None,
    weight_ln_gates: Tensor | None = None,
    bias_ln_gates: Tensor | None = None,
    weight_ln_c: Tensor | None = None,
    bias_ln_c: Tensor | None = None,
    cell_clip: float | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
    return_states: bool = False,
) -> tuple[Tensor, ...]:
    """One LSTM layer in one direction over a whole sequence (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

    With ``z = w_ih x_t + b_ih + w_hh h_{t-1} + b_hh`` split into four in PyTorch's gate order i, f, g, o:
    ``c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)`` and ``h_t = sigmoid(o) tanh(c_t)``, or ``w_hr`` times that with a
    projection (Sak et al. 2014). T steps, B sequences, I inputs, H hidden units, P outputs (P = H without ``w_hr``).
    All floating tensors share one dtype (float32, float64, bfloat16, float16) and one device, and may have any strides.
    The formulas of the options and their sources are in :class:`fastseq.reference.lstm.Options`.

    Args:
        x: input, ``[T, B, I]``, T at least 1.
        h0: hidden state before the first step processed, ``[B, P]``.
        c0: cell state before the first step processed, ``[B, H]``.
        w_ih: input weights, ``[4H, I]``.
        w_hh: recurrent weights, ``[4H, P]``.
        b_ih: input bias, ``[4H]``, or None.
        b_hh: recurrent bias, ``[4H]``, or None.
        w_hr: projection, ``[P, H]``, or None.
        peephole: ``[3, H]``, the weights by which ``c_{t-1}`` enters i and f, and ``c_t`` o. Not with layer
            normalisation: neither published form has them.
        reverse: process the steps from the last to the first. Results keep the order of the input.
        lengths: integers ``[B]`` on any device, from 0 to T, in any order: sequence b ends after ``lengths[b]`` steps.
            Its output is zero from there on, and its final state is that of its last valid step.
        reset: bool ``[T, B]``: where true, a new episode starts at step t. No state and no gradient crosses between t
            and t - 1, in either direction.
        reset_state: ``(h, c)`` that an episode starts from, ``[B, P]`` and ``[B, H]``, or ``[T, B, ·]``: row t is what
            step t takes when it is the one that starts (in reverse the step before the one where ``reset`` is true).
            Zeros if None. They receive gradients.
        h_mask: ``[B, P]``, multiplies ``h_{t-1}`` before the recurrent product at every step: recurrent dropout, scaled
            by the caller.
        zoneout_h: bool ``[T, B, P]``: where true, ``h_t`` keeps the value of ``h_{t-1}``. Or a rate from 0 to 1: the
            expectation, for evaluation.
        zoneout_c: the same of the cell, ``[T, B, H]``.
        weight_ln_ih, weight_ln_hh: ``[4H]``, with ``weight_ln_c`` and ``bias_ln_c``: layer normalisation as in haste.
        weight_ln_gates, bias_ln_gates: ``[4H]``, with ``weight_ln_c`` and ``bias_ln_c``: as in torchaudio.
        weight_ln_c, bias_ln_c: ``[H]``.
        cell_clip: the cell state is clipped to ±cell_clip.
        grad_clip: dL/dh_t is clipped elementwise to ±grad_clip at every step of the backward.
        recompute: keep no gates for the backward but make them again.
        return_states: whether to return all cell states and gates too.

    Returns:
        ``y [T, B, P]``, ``h_n [B, P]``, ``c_n [B, H]`` in the dtype of ``x``; the states are those after the last step
        processed. Under autocast the dtype is autocast's, as for ``torch.nn.LSTM``. With ``return_states`` also
        ``c [T, B, H]`` and ``gates [T, B, 4H]`` after activation, order i, f, g, o; zero past the end of a sequence.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype or device.
        fastseq.ShapeError: an argument has the wrong rank or size, T or H is 0, or a length is out of range.
        ValueError: a number is out of range, or two options make no sense together; the message says why.
    """
    flags = None
    if lengths is not None or reset is not None:
        flags = checked_flags(x, lengths, reset, reverse)
    if (
        peephole is None
        and reset_state is None
        and h_mask is None
        and zoneout_h is None
        and zoneout_c is None
        and weight_ln_ih is None
        and weight_ln_hh is None
        and weight_ln_gates is None
        and bias_ln_gates is None
        and weight_ln_c is None
        and bias_ln_c is None
        and cell_clip is None
        and grad_clip is None
        and not recompute
        and not return_states
    ):
        return layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags, reverse)
    if reset_state is not None and reset is None:
        raise ValueError("reset_state: expected None without reset: there is no step that would take it")
    h_reset, c_reset = pair_of("reset_state", reset_state)
    options = Options(
        h_reset,
        c_reset,
        h_mask,
        zoneout_h,
        zoneout_c,
        peephole,
        weight_ln_ih,
        weight_ln_hh,
        weight_ln_gates,
        bias_ln_gates,
        weight_ln_c,
        bias_ln_c,
        cell_clip,
        grad_clip,
    )
    return layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags, reverse, options, recompute, return_states)


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    options: Options | None = None,
    recompute: bool = False,
    return_states: bool = False,
) -> tuple[Tensor, ...]:
    """:func:`lstm` with step flags for its direction instead of ``lengths`` and ``reset``, and its options as one."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = (
            under_autocast(value, dtype) for value in (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        )
    _check(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    if options is None and not recompute and not return_states:
        return _lstm.call(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags, reverse, 0)
    if recompute and return_states:
        raise ValueError("recompute: expected False with return_states, which returns the gates that it would not keep")
    hidden = c0.shape[1]
    extra = _checked(options or Options(), dtype, x, h0.shape[1], hidden)
    if options is not None and options.weight_ln_c is not None and not return_states:
        # A backward through layer normalisation needs the sums before it, up to twice as many numbers as the gates: it
        # makes them again, and the gates with them.
        recompute = True
    given = x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, flags, *extra[:-4], reverse, *extra[-4:], recompute, return_states
    y, h_n, c_n, c, gates = _options_fwd(*given)
    return (y, h_n, c_n, *states_of(c, gates, hidden, flags, x.dtype)) if return_states else (y, h_n, c_n)


def _checked(options: Options, dtype: torch.dtype | None, x: Tensor, outputs: int, hidden: int) -> tuple[Any, ...]:
    """The options as the schema has them, tensors first, after their checks; floating ones in autocast's ``dtype``."""
    values = vars(options)
    if dtype is not None:
        values = {name: under_autocast(value, dtype) for name, value in values.items()}
    steps, batch = x.shape[:2]
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"h_mask": ((batch, outputs), "[B, P]")}
    shapes |= {"peephole": ((3, hidden), "[3, H]")}
    shapes |= dict.fromkeys(_GATE_NORMS, ((4 * hidden,), "[4H]")) | dict.fromkeys(_CELL_NORMS, ((hidden,), "[H]"))
    given = [name for name in shapes if values[name] is not None]
    h_reset, c_reset = values["h_reset"], values["c_reset"]
    states = [] if h_reset is None else [("reset_state[0]", h_reset), ("reset_state[1]", c_reset)]
    check_kinds([("x", x), *((name, values[name]) for name in given), *states], frozenset())
    check_shapes((name, values[name], *shapes[name]) for name in given)
    if h_reset is not None:
        named = ("reset_state[0]", h_reset, outputs, "P"), ("reset_state[1]", c_reset, hidden, "H")
        check_reset_state(named, steps, batch)
        h_reset, c_reset = (value if value.dim() == 3 else value.unsqueeze(0) for value in (h_reset, c_reset))
    masks, rates = [], []
    for name, size, letter in (("zoneout_h", outputs, "P"), ("zoneout_c", hidden, "H")):
        zoneout = values[name]
        check_zoneout(name, zoneout, (steps, batch, size), f"[T, B, {letter}]", x.device)
        is_mask = isinstance(zoneout, Tensor)
        masks.append(zoneout if is_mask else None)
        rates.append(0.0 if is_mask else float(zoneout or 0))
    limits = {name: values[name] for name in ("cell_clip", "grad_clip")}
    check_limits(limits.items())
    _check_together(frozenset(given))
    weights = (values[name] for name in _OPTION_WEIGHTS)
    return (h_reset, c_reset, values["h_mask"], *masks, *weights, *rates, *limits.values())


def _check_together(given: frozenset[str]) -> None:
    """Options that make no sense together, or only together.

    Raises:
        ValueError: saying which and why.
    """
    norm = frozenset(name for name in given if "_ln_" in name)
    if norm and norm not in (_HASTE, _TORCHAUDIO):
        raise ValueError(
            f"layer normalisation: expected all of {', '.join(sorted(_HASTE))} (as haste has it) or all of "
            f"{', '.join(sorted(_TORCHAUDIO))} (as torchaudio has it), got {', '.join(sorted(norm))}"
        )
    if norm and "peephole" in given:
        raise ValueError(
            "peephole: expected None with layer normalisation: neither haste's nor torchaudio's form has peepholes, "
            "and where they would enter is not defined"
        )


def _check(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> None:
    check_kinds(
        (
            ("x", x),
            ("h0", h0),
            ("c0", c0),
            ("w_ih", w_ih),
            ("w_hh", w_hh),
            ("b_ih", b_ih),
            ("b_hh", b_hh),
            ("w_hr", w_hr),
        ),
        optional=_OPTIONAL,
    )
    if x.dim() != 3:
        refuse_shape("x", "shape [T, B, I]", x.shape)
    if w_ih.dim() != 2 or w_ih.shape[0] == 0 or w_ih.shape[0] % 4:
        refuse_shape("w_ih", "shape [4H, I] with a hidden size H of at least 1", w_ih.shape)
    if w_hr is not None and (w_hr.dim() != 2 or w_hr.shape[0] == 0):
        refuse_shape("w_hr", "shape [P, H] with P of at least 1", w_hr.shape)
    steps, batch, inputs = x.shape
    if steps == 0:
        refuse_shape("x", "sequence length to be larger than 0 in RNN (x is [T, B, I])", x.shape)
    rows = w_ih.shape[0]
    hidden = rows // 4
    outputs = hidden if w_hr is None else w_hr.shape[0]
    check_shapes(
        (
            ("w_ih", w_ih, (rows, inputs), "[4H, I]"),
            ("w_hr", w_hr, (outputs, hidden), "[P, H]"),
            ("w_hh", w_hh, (rows, outputs), "[4H, P]"),
            ("b_ih", b_ih, (rows,), "[4H]"),
            ("b_hh", b_hh, (rows,), "[4H]"),
            ("h0", h0, (batch, outputs), "[B, P]"),
            ("c0", c0, (batch, hidden), "[B, H]"),
        )
    )


def _fake_fwd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    save: int,
) -> tuple[Tensor, ...]:
    steps, batch, hidden = x.shape[0], x.shape[1], w_hh.shape[0] // 4
    outputs = h0.shape[1]
    c_shape, gates_shape = tape_shapes(steps, batch, hidden) if save else ((0,), (0,))
    wide = accumulate_dtype(x.dtype)
    return (
        x.new_empty((steps, batch, outputs)),
        x.new_empty((batch, outputs)),
        x.new_empty((batch, hidden)),
        x.new_empty(c_shape, dtype=wide),
        x.new_empty(gates_shape, dtype=wide),
    )


def _fake_options_fwd(*args: Any) -> tuple[Tensor, ...]:
    *_, recompute, save = args
    given: Any = (*args[: len(_INPUTS)], False, save)
    *results, gates = _fake_fwd(*given)
    return (*results, gates.new_empty(0) if recompute else gates)


_INPUTS = (
    Operand("x", 1, NEEDS_X),
    Operand("h0", 0, NEEDS_STATE),
    Operand("c0", 0, NEEDS_STATE),
    Operand("w_ih", NO_BATCH, NEEDS_WEIGHTS),
    Operand("w_hh", NO_BATCH, NEEDS_WEIGHTS),
    Operand("b_ih", NO_BATCH, NEEDS_WEIGHTS, optional=True),
    Operand("b_hh", NO_BATCH, NEEDS_WEIGHTS, optional=True, shares=True),
    Operand("w_hr", NO_BATCH, NEEDS_WEIGHTS, optional=True),
    Operand("flags", 1, optional=True),
)
_OUTPUTS = Result("y", 1), Result("h_n", 0), Result("c_n", 0)
_TAPE = Result("c", 1), Result("gates", 1)

_lstm = Operation(
    "lstm",
    inputs=_INPUTS,
    settings=("bool reverse",),
    outputs=_OUTPUTS,
    tape=_TAPE,
    fake=_fake_fwd,
    reference=(reference_fwd, reference_bwd),
    cpp=(kernels.lstm_fwd, kernels.lstm_bwd),
)

_OPTION_INPUTS = (
    Operand("h_reset", 1, NEEDS_RESET, optional=True),  # [1 or T, B, P]
    Operand("c_reset", 1, NEEDS_RESET, optional=True),  # [1 or T, B, H]
    Operand("h_mask", 0, NEEDS_MASK, optional=True),
    Operand("zoneout_h", 1, optional=True),
    Operand("zoneout_c", 1, optional=True),
    *(Operand(name, NO_BATCH, NEEDS_WEIGHTS, optional=True) for name in _OPTION_WEIGHTS),
)


def _used(tensors: Any, settings: Any, with_backward: bool) -> list[str]:
    """The options that a call uses, from its tensors beyond the plain ones and its settings."""
    h_reset, _, h_mask, zoneout_h, zoneout_c, peephole, *norm = tensors
    _, rate_h, rate_c, cell_clip, grad_clip, recompute = settings
    uses = {
        "reset_state": h_reset is not None,
        "h_mask": h_mask is not None,
        "zoneout": zoneout_h is not None or zoneout_c is not None or rate_h > 0 or rate_c > 0,
        "peephole": peephole is not None,
        "layer_norm": any(value is not None for value in norm),
        "cell_clip": cell_clip is not None,
        "grad_clip": with_backward and grad_clip is not None,
        "recompute": with_backward and recompute,
    }
    return [option for option, used in uses.items() if used]


def _used_by_fwd(*args: Any) -> list[str]:
    first = len(_INPUTS)
    tensors, settings, save = (
        args[first : first + len(_OPTION_INPUTS)],
        args[first + len(_OPTION_INPUTS) : -1],
        args[-1],
    )
    return _used(tensors, settings, with_backward=save != 0)


def _used_by_bwd(*args: Any) -> list[str]:
    first = len(_OUTPUTS) + len(_TAPE) + len(_INPUTS)
    tensors, rest = args[first : first + len(_OPTION_INPUTS)], args[first + len(_OPTION_INPUTS) :]
    states = ["return_states"] if args[3] is not None or args[4] is not None else []
    return _used(tensors, rest[1 + len(_TAPE) : -1], with_backward=True) + states


_options_fwd = Operation(
    "lstm_options",
    inputs=(*_INPUTS, *_OPTION_INPUTS),
    settings=(
        "bool reverse",
        "float zoneout_h_rate",
        "float zoneout_c_rate",
        "float? cell_clip",
        "float? grad_clip",
        "bool recompute",
    ),
    outputs=_OUTPUTS,
    tape=_TAPE,
    fake=_fake_options_fwd,
    reference=(reference_options_fwd, reference_options_bwd),
    cpp=(kernels.lstm_options_fwd, kernels.lstm_options_bwd),
    tape_gradients=True,
    options_of="lstm",
    options_used=(_used_by_fwd, _used_by_bwd),
).fwd
