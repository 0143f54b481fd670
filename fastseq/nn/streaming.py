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
from typing import Any

import torch
from torch import Tensor

from fastseq import cpu
from fastseq.ops.eager import PLAIN_TYPES, are_plain, is_eager

States = tuple[Tensor, ...]


# The shapes of a step's arguments and results, and the number of rows: x, states, y, batch. A plain tuple: reading
# a field of a named one costs as much as looking at a tensor.
Form = tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...], int]


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
        weights: list[Any] = [module._parameters.get(name) for of in names for name in of.values()]
        return (
            cpu.available()
            and is_eager()
            and all(weight is not None for weight in weights)
            and are_plain(x, *states, *weights)
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
        if form is None or not is_eager() or module._step_nonlinearity() != self._nonlinearity:
            return None
        x_shape, state_shapes, y_shape, batch = form
        dtype = self._dtype
        h, c = states if len(states) == 2 else (states[0], None)
        # The same for each of the three, written out: a call costs as much as what it looks at.
        if (
            type(x) not in PLAIN_TYPES
            or x.shape != x_shape
            or x.dtype is not dtype
            or not x.is_cpu
            or not x.is_contiguous()
            or x.is_neg()
            or type(h) not in PLAIN_TYPES
            or h.shape != state_shapes[0]
            or h.dtype is not dtype
            or not h.is_cpu
            or not h.is_contiguous()
            or h.is_neg()
        ):
            return None
        if c is None:
            if len(state_shapes) != 1:
                return None
        elif (
            len(state_shapes) != 2
            or type(c) not in PLAIN_TYPES
            or c.shape != state_shapes[1]
            or c.dtype is not dtype
            or not c.is_cpu
            or not c.is_contiguous()
            or c.is_neg()
        ):
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
        y = torch.empty_like(x) if y_shape == x_shape else x.new_empty(y_shape)
        h_n = torch.empty_like(h)
        threads = torch.get_num_threads()
        run = self._handle.run
        if c is None:
            done = run(batch, x.data_ptr(), h.data_ptr(), 0, y.data_ptr(), h_n.data_ptr(), 0, threads)
            return (y, (h_n,)) if done else None
        c_n = torch.empty_like(c)
        done = run(
            batch, x.data_ptr(), h.data_ptr(), c.data_ptr(), y.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), threads
        )
        return (y, (h_n, c_n)) if done else None


def _wants_gradient(x: Tensor, states: States, weights: tuple[tuple[str, Tensor, int, int | None], ...]) -> bool:
    return (
        x.requires_grad
        or any(state.requires_grad for state in states)
        or any(weight.requires_grad for _, weight, _, _ in weights)
    )


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version
