"""How gradients flow through time: what vanishes, what explodes, and what clipping and gates do about it.

The total gradient of hidden state t has two parts, dL/dh_t = dL/dy_t + W_hhᵀ dL/dz_{t+1} with z the sum before the
activations. The first arrives at the layer's output. The second comes out of the kernel's own backward: zeros, as many
as the layer has outputs, are appended to its input, with W_hh as their input weights. They change no value, and their
gradient at step t + 1 is W_hhᵀ dL/dz_{t+1}, made by the one product over all steps that makes dL/dx anyway.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fastseq._extras import require
from fastseq.nn.forward import RecurrentForward
from fastseq.nn.lstm import LSTMForward
from fastseq.ops.flags import CUT, PADDING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientRangeWarning(UserWarning):
    """A norm ‖dL/dh_t‖ has left its range."""


@dataclass
class _Trace:
    """One layer in one direction during one forward, with the gradients that its backward brings."""

    reverse: bool
    flags: Tensor | None  # [T, B]
    grad_clip: float | None
    probe: Tensor  # zeros [T, B, P]
    arrived: dict[str, Tensor] = field(default_factory=dict)  # at y [T, B, P], at h_n [B, P], at the probe [T, B, P]

    def watch(self, name: str, tensor: Tensor) -> None:
        def keep(gradient: Tensor | None) -> None:
            self.arrived.pop(name, None)  # of an earlier backward through the same graph
            if gradient is not None:  # nothing arrives at a state that no loss reads
                self.arrived[name] = gradient.detach()

        tensor.register_hook(keep)

    def total(self) -> Tensor:
        """dL/dh_t of every step, [T, B, P] in float32 or wider; zero past the end of a sequence."""
        wide = torch.promote_types(self.probe.dtype, torch.float32)
        total = torch.zeros_like(self.probe, dtype=wide)
        if "y" in self.arrived:
            total += self.arrived["y"]
        if "probe" in self.arrived:
            of_next = self.arrived["probe"].to(wide)
            if self.flags is not None:  # what a step takes that is cut off from the one before is not that one's h
                of_next = of_next.masked_fill(((self.flags & CUT) != 0).unsqueeze(-1), 0)
            if self.reverse:
                total[1:] += of_next[:-1]
            else:
                total[:-1] += of_next[1:]
        if "h_n" in self.arrived:
            batch = torch.arange(total.size(1), device=total.device)
            last = torch.zeros_like(batch) if self.reverse else self._lengths() - 1
            some = self._lengths() > 0
            total[last[some], batch[some]] += self.arrived["h_n"][some]
        if self.flags is not None:
            total.masked_fill_(((self.flags & PADDING) != 0).unsqueeze(-1), 0)
        return total if self.grad_clip is None else total.clamp_(-self.grad_clip, self.grad_clip)

    def _lengths(self) -> Tensor:
        steps, batch = self.probe.shape[:2]
        if self.flags is None:
            return torch.full((batch,), steps, device=self.probe.device)
        return ((self.flags & PADDING) == 0).sum(0)


class GradientRecorder:
    """Records dL/dh_t of every step and layer of ``rnn`` during the backward passes made inside the ``with`` block.

    The forward and the backward are the layer's own, with its input wider by P columns of zeros; values and gradients
    stay as they are. The last forward, with gradients enabled, of the module is the one recorded::

        with GradientRecorder(model.recurrent) as recorder:
            loss(model(x)).backward()
        recorder.norms()  # [L·D, T]

    Args:
        rnn: ``fastseq.LSTM``, ``fastseq.RNN``, or what ``convert(keep_type=True)`` makes.

    Raises:
        TypeError: ``rnn`` is something else.
        ValueError: it has zoneout, or recurrent dropout in training mode, or haste's layer normalisation: h_{t-1} then
            enters step t by another way than W_hh alone.
    """

    def __init__(self, rnn: RecurrentForward) -> None:
        _check(rnn)
        if any(getattr(rnn, "zoneout", ())):
            raise ValueError("rnn: expected no zoneout: by it h_{t-1} enters h_t beside W_hh")
        if getattr(rnn, "layer_norm", None) == "haste":
            raise ValueError("rnn: expected layer_norm other than 'haste', which normalises W_hh h_{t-1} by itself")
        self.rnn = rnn
        self._traces: list[_Trace] = []

    def __enter__(self) -> Self:
        self._run = self.rnn._direction
        # On the instance, which hides the method of the class. Elsewhere torch's own layer would serve.
        self.rnn.__dict__["_direction"] = self._direction
        self.rnn.__dict__["_served_by_vendor"] = lambda *_: False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        del self.rnn.__dict__["_direction"], self.rnn.__dict__["_served_by_vendor"]

    def gradients(self) -> list[Tensor]:
        """dL/dh_t of each layer and direction, [T, B, P], time in input order, a packed batch in its packed order.

        Raises:
            RuntimeError: there was no backward inside the block.
        """
        if not any(trace.arrived for trace in self._traces):
            raise RuntimeError("GradientRecorder: expected a forward and a backward of rnn inside the with block")
        return [trace.total() for trace in self._traces]

    def norms(self) -> Tensor:
        """‖dL/dh_t‖ over batch and units, [L·D, T]."""
        return torch.stack([total.flatten(1).norm(dim=1) for total in self.gradients()])

    def _direction(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: Mapping[str, Tensor],
        flags: Tensor | None,
        reverse: bool,
        resets: tuple[Tensor, ...] | None,
        return_states: bool,
    ) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self._run(x, states, weights, flags, reverse, resets, return_states)
        if self.rnn.recurrent_dropout > 0 and self.rnn.training:
            raise ValueError("rnn: expected no recurrent dropout in training mode: call eval() before")
        probe = x.new_zeros(x.size(0), x.size(1), weights["w_hh"].size(1)).requires_grad_()
        trace = _Trace(reverse, flags, self.rnn.grad_clip, probe)
        wider = {**weights, "w_ih": torch.cat([weights["w_ih"], weights["w_hh"]], dim=1)}
        y, h_n, *rest = self._run(torch.cat([x, probe], dim=2), states, wider, flags, reverse, resets, return_states)
        for name, tensor in (("y", y), ("h_n", h_n), ("probe", probe)):
            trace.watch(name, tensor)
        if len(self._traces) == self.rnn.num_layers * (2 if self.rnn.bidirectional else 1):
            self._traces.clear()  # another forward begins
        self._traces.append(trace)
        return y, h_n, *rest


class GradientWatch(GradientRecorder):
    """A callback for training loops, which warns when a norm ‖dL/dh_t‖ leaves its range::

        with GradientWatch(model.recurrent, low=1e-8, high=1e2) as watch:
            for step, batch in enumerate(batches):
                loss(model(batch)).backward()
                watch(step)

    Args:
        rnn: as of :class:`GradientRecorder`.
        low, high: the range, 0 ≤ low < high.

    Raises:
        ValueError: the range is empty.
    """

    def __init__(self, rnn: RecurrentForward, low: float = 1e-8, high: float = 1e3) -> None:
        super().__init__(rnn)
        if not 0 <= low < high:
            raise ValueError(f"low, high: expected 0 <= low < high, got {low!r}, {high!r}")
        self.low, self.high = low, high
        self._outside: dict[int, str] = {}

    def __call__(self, step: int) -> Tensor:
        """Call it after a backward. Warns once for each layer (and direction) whose norms go out of the range, and
        again when they have been inside since.

        Returns:
            The norms, [L·D, T].
        """
        norms = self.norms()
        for layer, of_layer in enumerate(norms):
            found = self._found(of_layer)
            if found is not None and self._outside.get(layer) != found[0]:
                what, t = found
                warnings.warn(
                    f"step {step}, layer {layer}: the gradient {what}: ‖dL/dh_t‖ = {of_layer[t].item():.3g} at "
                    f"t = {t} of {len(of_layer)}, expected {self.low:g} to {self.high:g}",
                    GradientRangeWarning,
                    stacklevel=2,
                )
            self._outside[layer] = "" if found is None else found[0]
        return norms

    def _found(self, norms: Tensor) -> tuple[str, int] | None:
        if not norms.isfinite().all():
            return "is not finite", int((~norms.isfinite()).int().argmax())
        if norms.max() > self.high:
            return "explodes", int(norms.argmax())
        if norms.min() < self.low:
            return "vanishes", int(norms.argmin())
        return None


def gradient_flow(
    rnn: RecurrentForward,
    x: Tensor,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
    layer: int = -1,
) -> Tensor:
    """‖dL/dh_t‖ for every t, over batch and units, from one forward and one backward of the layer's own kernels
    (Bengio et al. 1994; Pascanu et al. 2013, section 2). No ``.grad`` of a parameter changes.

    Args:
        rnn: as of :class:`GradientRecorder`.
        x: input, as ``rnn`` takes it: [T, B, I], [B, T, I] if batch_first, or [T, I].
        hx: initial state, as ``rnn`` takes it.
        lengths: [B], as ``rnn`` takes them.
        loss: makes the scalar L of the output of ``rnn``. By default L is the sum over the last hidden state of the
            last layer, so that ‖dL/dh_t‖ is what ‖∂h_T/∂h_t‖ lets through.
        layer: which layer (with two directions: layer · 2 + direction), the last by default.

    Returns:
        [T], time in input order.

    Raises:
        TypeError, ValueError, fastseq.ShapeError: as :class:`GradientRecorder` and ``rnn``, or ``loss``
            gives no scalar.
        IndexError: there is no such layer.
    """
    with GradientRecorder(rnn) as recorder, torch.enable_grad():
        output, state = rnn(x, hx) if lengths is None else rnn(x, hx, lengths=lengths)
        h_n = state[0] if isinstance(state, tuple) else state
        value = h_n[-2 if rnn.bidirectional else -1 :].sum() if loss is None else loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss: expected a function that gives a scalar, got {value!r}")
        value.backward(inputs=[trace.probe for trace in recorder._traces])
    norms: Tensor = recorder._traces[layer].total().flatten(1).norm(dim=1)
    return norms


def jacobian_norms(
    rnn: RecurrentForward,
    x: Tensor,
    pairs: Sequence[tuple[int, int]],
    hx: Any = None,
    *,
    layer: int = -1,
    ord: int | str = 2,
) -> Tensor:
    """‖∂h_j/∂h_k‖ for chosen pairs (j, k), the product of j - k Jacobians in BPTT (Pascanu et al. 2013, eq. 5).

    In an LSTM ∂h_j/∂h_k is taken with c_k held: what goes through the cell from before k is not h_k's doing. For each
    pair the steps after k are run once with every sequence P times in the batch, and their backward gives the whole
    Jacobian. Noise between layers is left out.

    Args:
        rnn: ``fastseq.LSTM`` or ``fastseq.RNN``, of one direction.
        x: input, [T, B, I], or [B, T, I] if batch_first.
        pairs: (j, k) with 0 <= k < j < T.
        hx: initial state, as ``rnn`` takes it.
        layer: which layer, the last by default. The layers below are its input, which is held.
        ord: of ``torch.linalg.matrix_norm``: 2, the largest singular value, or ``"fro"``.

    Returns:
        [len(pairs), B].

    Raises:
        TypeError: ``rnn`` is something else.
        ValueError: it has two directions, recurrent dropout or zoneout in training mode, or a pair is none.
        IndexError: there is no such layer.
    """
    _check(rnn)
    if rnn.bidirectional:
        raise ValueError("rnn: expected one direction, got a bidirectional layer")
    if rnn.training and (rnn.recurrent_dropout > 0 or any(getattr(rnn, "zoneout", ()))):
        raise ValueError("rnn: expected no noise on the states in training mode: call eval() before")
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [T, B, I], or [B, T, I] if batch_first, got {list(x.shape)}")
    x = x.transpose(0, 1) if rnn.batch_first else x
    steps, batch = x.shape[:2]
    for j, k in pairs:
        if not 0 <= k < j < steps:
            raise ValueError(f"pairs: expected (j, k) with 0 <= k < j < T = {steps}, got {(j, k)}")
    index = range(rnn.num_layers)[layer]
    initial = rnn._initial(x, batch, (hx,) if isinstance(hx, Tensor) else hx)
    is_lstm = isinstance(rnn, LSTMForward)
    with torch.no_grad():
        for below in range(index + 1):
            of_layer, weights = x, rnn._weights(below)
            x, _, *rest = rnn._direction(x, tuple(s[below] for s in initial), weights, None, False, None, is_lstm)
    everything = (x, rest[1]) if is_lstm else (x,)  # h and c of every step
    norms = []
    for j, k in pairs:
        h, *c = (state[k].repeat_interleave(x.size(2), dim=0) for state in everything)
        h.requires_grad_()
        with torch.enable_grad():
            between = of_layer[k + 1 : j + 1].repeat_interleave(x.size(2), dim=1)
            _, h_j, *_ = rnn._direction(between, (h, *c), weights, None, False, None, False)
            one_each = h_j.unflatten(0, (batch, -1)).diagonal(dim1=1, dim2=2).sum()  # unit i of copy i
            (rows,) = torch.autograd.grad(one_each, h)
        norms.append(torch.linalg.matrix_norm(rows.unflatten(0, (batch, -1)), ord))
    return torch.stack(norms)


def plot_gradient_flow(
    curves: Mapping[str, Tensor], path: str | os.PathLike[str] | None = None, *, title: str = ""
) -> Figure:
    """Draws ‖dL/dh_t‖ over t, one panel a curve, side by side on one logarithmic axis.

    Args:
        curves: by name, each [T] as :func:`gradient_flow` gives it. What is zero or not finite is left out.
        path: where the picture goes (``.png``, ``.pdf``, ``.svg``), if anywhere.
        title: above the panels.

    Returns:
        matplotlib's figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    require("matplotlib", "cli", "plot_gradient_flow")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * max(1, len(curves)), 2.8), layout="constrained")
    panels = figure.subplots(1, max(1, len(curves)), sharey=True, squeeze=False)[0]
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        values = curve.detach().double().cpu()
        panel.semilogy(torch.where((values > 0) & values.isfinite(), values, torch.nan).numpy())
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("step t")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("‖dL/dh_t‖")
    if title:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure


def _check(rnn: object) -> None:
    if not isinstance(rnn, RecurrentForward):
        raise TypeError(
            f"rnn: expected fastseq.LSTM or fastseq.RNN, got {type(rnn).__name__} (fastseq.convert makes one of "
            "torch's)"
        )
