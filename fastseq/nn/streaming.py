"""One step at a time: weights packed once, and kept as long as they are what they were.

Packing costs more than a step, so only here are packed weights kept. ``Tensor._version`` does not see every write
(``.data`` passes it by), so they are valid only while each weight is the same tensor, at the same address, of the same
version, and has the same values in a strided sample. A write through ``.data`` of a few numbers that the sample
does not hold is not seen: call ``module.train(module.training)`` after such a write, which drops the packed weights,
as ``_apply`` (``to``, ``half``, …) and ``load_state_dict`` do.

A step of a small layer takes some microseconds, and each look at a tensor from Python a twentieth of one. So what a
stream repeats is checked against what the last checked step had, by :meth:`PackedStep.repeat`, and only a step that
differs goes through all checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import cpu
from fastseq.ops import dispatch

States = tuple[Tensor, ...]

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class Form(NamedTuple):
    """The shapes of a step's arguments and results."""

    x: tuple[int, ...]
    states: tuple[tuple[int, ...], ...]
    y: tuple[int, ...]
    batch: int


class PackedStep:
    """The packed weights of a module, and the form that its last step had."""

    __slots__ = ("_dtype", "_form", "_handle", "_nonlinearity", "_weights")

    def __init__(self, module: Any, names: Sequence[Mapping[str, str]], nonlinearity: str | None) -> None:
        """``names``: of each layer, how the operation's ``w_ih``, ``w_hh``, … are called in the module."""
        held = module._parameters
        self._weights = tuple(
            (name, held[name], held[name].data_ptr(), _version(held[name])) for of in names for name in of.values()
        )
        self._dtype = self._weights[0][1].dtype
        self._nonlinearity = nonlinearity
        self._handle = cpu.step.pack(
            [{operand: held[name] for operand, name in of.items()} for of in names], nonlinearity
        )
        self._form: Form | None = None

    @staticmethod
    def serves(module: Any, names: Sequence[Mapping[str, str]], x: Tensor, states: States) -> bool:
        """Whether the module's weights can be packed for such arguments: parameters, dense, on the CPU, no gradient."""
        weights = [module._parameters.get(name) for of in names for name in of.values()]
        return (
            cpu.available()
            and _is_eager()
            and all(_is_plain(tensor) for tensor in (x, *states, *weights))
            and all(weight.is_contiguous() for weight in weights)
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *states, *weights)))
        )

    def first(self, module: Any, form: Form, x: Tensor, states: States) -> tuple[Tensor, States] | None:
        """A step whose arguments have been checked to be of this form; None where the weights are other ones now."""
        self._form = form
        return self.repeat(module, x.contiguous(), tuple(state.contiguous() for state in states))

    def repeat(self, module: Any, x: Tensor, states: States) -> tuple[Tensor, States] | None:
        """A step like the last one; None where it is not like that, or the packed weights cannot serve it.

        Everything is looked at here that memory safety and the validity of the packed weights need.
        """
        form = self._form
        if form is None or module._step_nonlinearity() != self._nonlinearity or not _is_eager() or not _may_repeat(x, form.x, self._dtype) or len(states) != len(form.states):
            return None
        for state, shape in zip(states, form.states, strict=True):
            if not _may_repeat(state, shape, self._dtype):
                return None
        held = module._parameters
        for name, weight, address, version in self._weights:
            if (
                held.get(name) is not weight
                or weight.data_ptr() != address
                or (version is not None and weight._version != version)
            ):
                return None
        if torch.is_grad_enabled() and _wants_gradient(x, states, self._weights):
            return None
        h = states[0]
        h_n = torch.empty_like(h)
        y = torch.empty_like(x) if form.y == form.x else x.new_empty(form.y)
        if len(states) == 1:
            finals: States = (h_n,)
            c = c_n = 0
        else:
            after = torch.empty_like(states[1])
            finals = (h_n, after)
            c, c_n = states[1].data_ptr(), after.data_ptr()
        done = self._handle.run(
            form.batch, x.data_ptr(), h.data_ptr(), c, y.data_ptr(), h_n.data_ptr(), c_n, torch.get_num_threads()
        )
        return (y, finals) if done else None


def _is_eager() -> bool:
    """Nothing records, transforms or replaces operations, so that a kernel may be called without the dispatcher."""
    return (
        not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_tracing()
        and dispatch.forced() in (None, "cpp")
    )


def _is_plain(tensor: Tensor | None) -> bool:
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    )


def _may_repeat(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def _wants_gradient(x: Tensor, states: States, weights: tuple[tuple[str, Tensor, int, int | None], ...]) -> bool:
    return (
        x.requires_grad
        or any(state.requires_grad for state in states)
        or any(weight.requires_grad for _, weight, _, _ in weights)
    )


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version
