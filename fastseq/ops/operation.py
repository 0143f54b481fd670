"""An operation with a backward of its own, declared once.

From the names of its tensors an :class:`Operation` makes what each needs: the schemas of ``fastseq::<name>_fwd``,
``<name>_bwd`` and ``<name>_bwd_`` (which may overwrite the tape), their kernels, the fakes of the backwards, autograd
at the ops' own ``Autograd`` key with second derivatives through the reference, and vmap by folding the batch. What it
does not know is the shapes of the forward's results and any arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastseq.ops import eager, transforms
from fastseq.ops import tape as tapes
from fastseq.ops.dispatch import library, register_kernels
from fastseq.reference.common import gradients

#: The batch dimension of a tensor that has none: a weight.
NO_BATCH = -1

_TAGS = (torch.Tag.pt2_compliant_tag,)


@dataclass(frozen=True)
class Operand:
    """One tensor that an operation takes.

    Attributes:
        name: in the schema.
        batch: the dimension that vmap folds its own into, or :data:`NO_BATCH`.
        needs: the bit of ``needs`` that asks for its gradient (:mod:`fastseq.ops.needs`); 0: it has none.
        optional: whether it may be None.
        shares: whether its gradient is that of the operand before it, as for the second of two biases.
    """

    name: str
    batch: int
    needs: int = 0
    optional: bool = False
    shares: bool = False


@dataclass(frozen=True)
class Result:
    """One tensor that an operation gives, with its batch dimension."""

    name: str
    batch: int


class Operation:
    """One operation of ``torch.ops.fastseq`` and its backward.

    The schemas are

    - ``<name>_fwd(inputs, settings, int save) -> (outputs, tape)``, the tape being empty unless ``save``, which
      :mod:`fastseq.ops.tape` explains;
    - ``<name>_bwd(grad_outputs, inputs, y, tape, settings, int needs) -> gradients``, with ``y`` the first output, and
      ``grad_outputs`` None where no gradient came. A gradient that ``needs`` does not ask for comes back as ``[0]``;
    - ``<name>_bwd_``, the same, free to overwrite the last tensor of the tape: for eager mode, when the graph is not
      kept and the tape is one that nobody else sees.

    The caller of the forward need not know whether a gradient will be wanted: the kernel at the ``Autograd`` key does,
    and keeps a tape then.

    Args:
        name: the stem of the three names.
        inputs: tensors taken, in the order of the schema.
        settings: what follows them in the schema, such as ``("bool reverse",)``.
        outputs: tensors given.
        tape: tensors that the forward leaves for the backward.
        fake: shapes of the forward's results, for ``torch.compile`` and ``torch.export``.
        reference: forward and backward kernels for every device; the backward takes ``differentiable=True`` too.
        cpp: forward and backward kernels for the CPU; the backward takes ``overwrite=True`` too.
        tape_gradients: whether a tape that the caller asked for with ``save`` is an output like the others. Its
            gradients then follow ``grad_outputs`` in the schemas of the backwards.
        options_of: the operation in :data:`fastseq.ops.dispatch.OPTIONS` whose options this one offers.
        options_used: two functions, of the arguments of the forward and of the backward, that tell which of those
            options a call uses.

    Attributes:
        fwd, bwd, bwd_: the ops.
        kernels: the C++ kernels of ``fwd`` and ``bwd_``, which :meth:`call` may call past the dispatcher. The forward
            takes ``checked=True``: its inputs have the sizes and the dtype that they should.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[Operand],
        settings: Sequence[str],
        outputs: Sequence[Result],
        tape: Sequence[Result],
        fake: Callable[..., tuple[Tensor, ...]],
        reference: tuple[Callable[..., Any], Callable[..., Any]],
        cpp: tuple[Callable[..., Any], Callable[..., Any]],
        tape_gradients: bool = False,
        options_of: str = "",
        options_used: tuple[Callable[..., Sequence[str]] | None, Callable[..., Sequence[str]] | None] = (None, None),
    ) -> None:
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs, self.tape = tuple(outputs), tuple(tape)
        self.received = (*outputs, *tape) if tape_gradients else self.outputs  # the results at which gradients arrive
        self.tape_gradients = tape_gradients
        # Each gradient given, as the places of the inputs whose gradient it is.
        self.slots: list[tuple[int, ...]] = []
        for place, operand in enumerate(inputs):
            if operand.shares:
                self.slots[-1] += (place,)
            elif operand.needs:
                self.slots.append((place,))
        self.weights = tuple(place for place, operand in enumerate(inputs) if operand.batch == NO_BATCH)
        self.weight_bits = 0
        for place in self.weights:
            self.weight_bits |= inputs[place].needs
        self._define(settings)
        ops = torch.ops.fastseq
        self.fwd, self.bwd, self.bwd_ = (getattr(ops, f"{name}_{kind}").default for kind in ("fwd", "bwd", "bwd_"))
        self.kernels = cpp[0], self._overwriting(cpp[1])
        self._register_kernels(reference, cpp, options_of, options_used)
        torch.library.register_fake(f"fastseq::{name}_fwd", fake, lib=library)
        for kind in ("bwd", "bwd_"):
            torch.library.register_fake(f"fastseq::{name}_{kind}", self._fake_bwd, lib=library)
        self._register_autograd(reference[1])
        torch.library.register_vmap(f"fastseq::{name}_fwd", self._vmap_fwd, lib=library)
        torch.library.register_vmap(f"fastseq::{name}_bwd", self._vmap_bwd, lib=library)

    def _define(self, settings: Sequence[str]) -> None:
        taken = [f"Tensor{'?' * operand.optional} {operand.name}" for operand in self.inputs]
        tape = [f"Tensor {result.name}" for result in self.tape]
        given = ", ".join([f"Tensor {result.name}" for result in self.outputs] + tape)
        library.define(f"{self.name}_fwd({', '.join([*taken, *settings, 'int save'])}) -> ({given})", tags=_TAGS)
        arriving = [f"Tensor? grad_{result.name}" for result in self.received]
        kept = [f"Tensor {self.outputs[0].name}", *tape]
        gradients = ", ".join(f"Tensor d{self.inputs[places[0]].name}" for places in self.slots)
        for kind, last in (("bwd", kept[-1]), ("bwd_", f"Tensor(a!) {self.tape[-1].name}")):
            arguments = [*arriving, *taken, *kept[:-1], last, *settings, "int needs"]
            library.define(f"{self.name}_{kind}({', '.join(arguments)}) -> ({gradients})", tags=_TAGS)

    def _register_kernels(
        self,
        reference: tuple[Callable[..., Any], Callable[..., Any]],
        cpp: tuple[Callable[..., Any], Callable[..., Any]],
        op: str,
        used: tuple[Callable[..., Sequence[str]] | None, Callable[..., Sequence[str]] | None],
    ) -> None:
        register_kernels(f"{self.name}_fwd", reference[0], cpp[0], op, used[0])
        register_kernels(f"{self.name}_bwd", reference[1], cpp[1], op, used[1])
        register_kernels(f"{self.name}_bwd_", reference[1], self.kernels[1], op, used[1])

    def _overwriting(self, bwd: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        overwritten = len(self.received) + len(self.inputs) + len(self.tape)

        def overwriting_bwd(*args: Any) -> tuple[Tensor, ...]:
            torch.autograd.graph.increment_version(args[overwritten])
            return bwd(*args, overwrite=True)  # type: ignore[no-any-return]

        return overwriting_bwd

    def call(self, *args: Any) -> tuple[Tensor, ...]:
        """The outputs of ``fwd(*args)``; where nobody could tell the difference, past the dispatcher.

        The inputs have been checked. Not for operations with options.
        """
        if not eager.may_call(*args[: len(self.inputs)]):
            return self.fwd(*args)[: len(self.outputs)]  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and transforms.wants_gradient(*args):
            return self._function.apply(None, *args)  # type: ignore[attr-defined, no-any-return]
        return self.kernels[0](*args, checked=True)[: len(self.outputs)]  # type: ignore[no-any-return]

    def _fake_bwd(self, *args: Any) -> tuple[Tensor, ...]:
        inputs = args[len(self.received) : len(self.received) + len(self.inputs)]
        needs, example = args[-1], inputs[0]
        results = []
        for places in self.slots:
            shape = next((inputs[place].shape for place in places if inputs[place] is not None), 0)
            results.append(example.new_empty(shape if needs & self.inputs[places[0]].needs else 0))
        return tuple(results)

    # Autograd.

    def _register_autograd(self, reference_bwd: Callable[..., Any]) -> None:
        self._function = forward = _forward_function(self)
        backward = _backward_function(self, reference_bwd)

        def autograd_fwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
            transforms.refuse_forward_mode(f"{self.name}_fwd", *args)
            if torch.is_grad_enabled() and transforms.wants_gradient(*args):
                return transforms.apply(forward, keyset, *args)  # type: ignore[no-any-return]
            return self.fwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]

        def autograd_bwd(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
            transforms.refuse_forward_mode(f"{self.name}_bwd", *args)
            if torch.is_grad_enabled() and transforms.wants_gradient(*args):
                return transforms.apply(backward, keyset, *args)  # type: ignore[no-any-return]
            return self.bwd.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]

        def autograd_bwd_(keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
            if torch.is_grad_enabled() and transforms.wants_gradient(*args):
                raise RuntimeError(
                    f"fastseq::{self.name}_bwd_ has no derivative: it overwrites its tape; use fastseq::{self.name}_bwd"
                )
            return self.bwd_.redispatch(keyset & transforms.below_autograd, *args)  # type: ignore[no-any-return]

        library.impl(f"{self.name}_fwd", autograd_fwd, "Autograd", with_keyset=True)
        library.impl(f"{self.name}_bwd", autograd_bwd, "Autograd", with_keyset=True)
        library.impl(f"{self.name}_bwd_", autograd_bwd_, "Autograd", with_keyset=True)

    # vmap: the mapped dimension becomes part of the batch, unless weights or their gradients differ along it.

    def _vmap_fwd(
        self, info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        if any(in_dims[place] is not None for place in self.weights):
            return transforms.one_by_one(self.fwd, info.batch_size, in_dims, args)
        batch = [operand.batch for operand in self.inputs]
        *given, save = transforms.fold_all(args, in_dims, info.batch_size, batch)
        results = self.fwd(*given, tapes.KEEP if save else 0)
        return transforms.unfold(results, info.batch_size, [result.batch for result in (*self.outputs, *self.tape)])

    def _vmap_bwd(
        self, info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        first = len(self.received)
        if args[-1] & self.weight_bits or any(in_dims[first + place] is not None for place in self.weights):
            return transforms.one_by_one(self.bwd, info.batch_size, in_dims, args)
        batch = [result.batch for result in self.received]
        batch += [operand.batch for operand in self.inputs]
        batch += [result.batch for result in (self.outputs[0], *self.tape)]
        results = self.bwd(*transforms.fold_all(args, in_dims, info.batch_size, batch))
        return transforms.unfold(results, info.batch_size, [self.inputs[places[0]].batch for places in self.slots])


def _forward_function(op: Operation) -> type[transforms.Function]:
    """``<name>_fwd`` with its backward. When the caller asked for no tape, it keeps one that nobody else sees."""
    taken, outputs, received = len(op.inputs), len(op.outputs), len(op.received)
    # Places among the arguments of forward, where the keyset comes before the inputs.
    bits = tuple((1 + place, operand.needs) for place, operand in enumerate(op.inputs) if operand.needs)
    firsts = tuple(1 + places[0] for places in op.slots)
    sharing = tuple(tuple(1 + place for place in places[1:]) for places in op.slots)

    class Forward(transforms.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet | None, *args: Any) -> tuple[Tensor, ...]:
            save = args[-1]
            how = tapes.ANY_ORDER if not save and not torch._C._are_functorch_transforms_active() else tapes.KEEP
            if keyset is None:  # past the dispatcher
                results = op.kernels[0](*args[:-1], how, checked=True)
            else:
                results = transforms.redispatch(op.fwd, keyset, *args[:-1], how)
            tape = results[outputs:]
            ctx.save_for_backward(*args[:taken], results[0], *tape)
            ctx.settings = args[taken:-1]
            ctx.private = not save
            ctx.direct = keyset is None
            ctx.set_materialize_grads(False)
            if ctx.direct:  # by Operation.call, which asks for no tape
                return tuple(results[:outputs])
            if not save:
                tape = tuple(value.new_empty(0) for value in tape)
            if not (save and op.tape_gradients):
                ctx.mark_non_differentiable(*tape)
            return (*results[:outputs], *tape)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            arriving = grads[:received]
            asked = ctx.needs_input_grad
            given: list[Tensor | None] = [None] * len(asked)
            for grad in arriving:
                if grad is not None:
                    break
            else:
                return tuple(given)
            needs = 0
            for place, bit in bits:
                if asked[place]:
                    needs |= bit
            saved = ctx.saved_tensors
            bwd: Callable[..., tuple[Tensor, ...]] = op.bwd
            if ctx.private and transforms.may_overwrite_tape(saved[-1], *arriving):
                bwd = op.kernels[1] if ctx.direct and eager.may_call(*arriving, *saved) else op.bwd_
            found = bwd(*arriving, *saved, *ctx.settings, needs)
            for first, others, grad in zip(firsts, sharing, found, strict=True):
                if asked[first]:
                    given[first] = grad
                for place in others:
                    if asked[place]:
                        # Not the same tensor twice, or whoever scales one gradient in place would scale both.
                        given[place] = grad.clone() if asked[first] else grad
            return tuple(given)

    Forward.__name__ = Forward.__qualname__ = op.name
    return Forward


def _backward_function(op: Operation, reference_bwd: Callable[..., Any]) -> type[transforms.Function]:
    """``<name>_bwd`` with its own backward: second derivatives go through the reference, whatever kernel served."""
    first = len(op.received)
    taken = first + len(op.inputs)
    kept = 1 + len(op.tape)

    class Backward(transforms.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
            results: tuple[Tensor, ...] = transforms.redispatch(op.bwd, keyset, *args)
            ctx.save_for_backward(*args[:taken])  # y and the tape are functions of these
            ctx.options = args[taken + kept :]
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            asked = ctx.needs_input_grad[1 : 1 + taken]

            def bwd(*inputs: Any) -> tuple[Tensor, ...]:
                unused = (inputs[first],) * kept  # for y and the tape
                return reference_bwd(*inputs, *unused, *ctx.options, differentiable=True)  # type: ignore[no-any-return]

            results = gradients(bwd, inputs, asked, grads, differentiable=True)
            rest = (None,) * (len(ctx.needs_input_grad) - 1 - taken)
            return (None, *(grad if need else None for grad, need in zip(results, asked, strict=True)), *rest)

    Backward.__name__ = Backward.__qualname__ = f"{op.name}_bwd"
    return Backward
