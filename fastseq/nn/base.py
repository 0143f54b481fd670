"""What LSTM and RNN have in common before any arithmetic: constructor, parameters, repr and state.

Names, order of registration, initial values and messages are those of ``torch.nn``, so that a seed, a checkpoint or an
``except`` clause means the same with either library.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import init

from fastseq.ops.checks import check_limits


class RecurrentBase(nn.Module):
    """The parameters of a stack of recurrent layers, named and ordered as in ``torch.nn.LSTM``.

    A plain ``nn.Module``, not a subclass of ``nn.LSTM`` or ``nn.RNN``: ``torch.compile`` refuses those.

    Each layer ``k`` and direction owns ``weight_ih_l{k}`` [G·H, I], ``weight_hh_l{k}`` [G·H, P], with ``bias`` also
    ``bias_ih_l{k}`` and ``bias_hh_l{k}`` [G·H], with ``proj_size`` also ``weight_hr_l{k}`` [P, H]; the reverse
    direction has the suffix ``_reverse``. G is 4 for the LSTM (gates i, f, g, o) and 1 for the RNN. All of them start
    uniform in ±1/√H. What a subclass has beyond torch's follows them.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    recurrent_dropout: float
    grad_clip: float | None
    recompute: bool

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        recurrent_dropout: float,
        grad_clip: float | None,
        recompute: bool,
        extra: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        """``extra``: stems and shapes of the parameters that torch.nn does not have."""
        super().__init__()
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        _check_arguments(self, dropout)
        self.recurrent_dropout = checked_rate("recurrent_dropout", recurrent_dropout)
        self.grad_clip = checked_limit("grad_clip", grad_clip)
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute: expected a bool, got {type(recompute).__name__}")
        self.recompute = recompute

        gates = 4 if mode == "LSTM" else 1
        output_size = proj_size or hidden_size
        directions = 2 if bidirectional else 1
        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []
        for layer in range(num_layers):
            layer_input_size = input_size if layer == 0 else output_size * directions
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (gates * hidden_size, layer_input_size),
                "weight_hh": (gates * hidden_size, output_size),
            }
            if bias:
                shapes |= {"bias_ih": (gates * hidden_size,), "bias_hh": (gates * hidden_size,)}
            if proj_size > 0:
                shapes |= {"weight_hr": (proj_size, hidden_size)}
            for suffix in ("", "_reverse")[:directions]:
                names = [f"{stem}_l{layer}{suffix}" for stem in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._flat_weights_names.extend(names)
                self._all_weights.append(names)
        # After all of torch's, so that these have the same values for the same seed with and without them.
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for stem, shape in extra.items():
                setattr(self, stem + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter anew, uniform in ±1/√hidden_size; layer normalisation starts as the identity."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for name, weight in self.named_parameters():
            if "weight_ln_" in name:
                init.ones_(weight)
            elif "bias_ln_" in name:
                init.zeros_(weight)
            else:
                init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing: no kernel here asks for weights in one block. It is there for code written for torch."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """torch's parameters, one list per layer and direction, in the order of registration."""
        return [[cast(nn.Parameter, getattr(self, name)) for name in names] for names in self._all_weights]

    @property
    def _flat_weights(self) -> list[Tensor]:
        # Read by code written against torch.nn (quantisation, pruning). Made anew each time, so it is never stale.
        return [cast(Tensor, getattr(self, name)) for name in self._flat_weights_names]

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if self.proj_size != 0:
            parts.append(f"proj_size={self.proj_size}")
        if self.num_layers != 1:
            parts.append(f"num_layers={self.num_layers}")
        if self.bias is not True:
            parts.append(f"bias={self.bias}")
        if self.batch_first is not False:
            parts.append(f"batch_first={self.batch_first}")
        if self.dropout != 0:
            parts.append(f"dropout={self.dropout}")
        if self.bidirectional is not False:
            parts.append(f"bidirectional={self.bidirectional}")
        if self.recurrent_dropout != 0:
            parts.append(f"recurrent_dropout={self.recurrent_dropout}")
        if self.grad_clip is not None:
            parts.append(f"grad_clip={self.grad_clip}")
        if self.recompute:
            parts.append(f"recompute={self.recompute}")
        return ", ".join(parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also takes the state of a torch.nn module, as when a pickled nn.LSTM is loaded inside fastseq.patch():
        # its lists of weights are caches, and would hide the ones made from the parameters.
        state = {name: value for name, value in state.items() if name not in ("_flat_weights", "_flat_weight_refs")}
        state.setdefault("proj_size", 0)
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def checked_rate(name: str, value: Any) -> float:
    """A probability.

    Raises:
        TypeError: no number.
        ValueError: not from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number from 0 to 1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)


def checked_limit(name: str, value: Any) -> float | None:
    """What a value is clipped to, or None.

    Raises:
        TypeError: no number.
        ValueError: not above 0.
    """
    check_limits(((name, value),))
    return None if value is None else float(value)


def _check_arguments(module: RecurrentBase, dropout: Any) -> None:
    """torch.nn's checks of the constructor's arguments, in its order and with its words."""
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Number) or not 0 <= module.dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )
    if module.dropout > 0 and module.num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
            f"num_layers greater than 1, but got dropout={dropout} and num_layers={module.num_layers}",
            stacklevel=4,  # the line that calls LSTM(...) or RNN(...)
        )
    if not isinstance(module.bias, bool):
        raise TypeError(f"bias should be of type bool, got: {type(module.bias).__name__}")
    if not isinstance(module.batch_first, bool):
        raise TypeError(f"batch_first should be of type bool, got: {type(module.batch_first).__name__}")
    if not isinstance(module.input_size, int):
        raise TypeError(f"input_size should be of type int, got: {type(module.input_size).__name__}")
    if module.input_size <= 0:
        raise ValueError("input_size must be greater than zero")
    if not isinstance(module.hidden_size, int):
        raise TypeError(f"hidden_size should be of type int, got: {type(module.hidden_size).__name__}")
    if module.hidden_size <= 0:
        raise ValueError("hidden_size must be greater than zero")
    if module.num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if module.proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if module.proj_size >= module.hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")
