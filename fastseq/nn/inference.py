"""A forward without gradients: from a module's parameters to the kernels in one piece.

The general way asks each tensor twice more what it is (the operation, and the launcher for memory safety), goes past
autograd and calls a dozen of torch's operations beside the kernel. Where a kernel has just filled the caches with
weights, all that takes several times as long as in a loop of its own: (T, B, I, H) = (1, 1, 256, 256) took 159 µs with
two threads on an AMX Xeon, in one piece 82.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import cpu
from fastseq.ops import eager
from fastseq.ops.transforms import wants_gradient

States = tuple[Tensor, ...]


def run(module: Any, x: Tensor, states: States | None) -> tuple[Tensor, States] | None:
    """All layers of a :class:`fastseq.nn.forward.RecurrentForward` over x [T, B, I].

    Args:
        module: the module, whose input and states have been checked.
        x: the input.
        states: each [L, B, ·]; zeros if None.

    Returns:
        y [T, B, P] and the last states, or None where this does not serve: a gradient is wanted, somebody records or
        replaces operations, or the module does more than plain layers in one direction do.
    """
    if module.bidirectional or module._alters_layers():
        return None
    if torch.compiler.is_compiling() or not cpu.available():
        return None
    held = module._parameters
    weights = [held.get(name) for name in module._flat_weights_names]
    given = (x, *weights) if states is None else (x, *states, *weights)
    if torch.is_grad_enabled() and wants_gradient(*given):
        return None
    if not (eager.is_eager() and eager.are_plain(*given)):
        return None
    return cpu.stack.forward(
        x, states, weights, module.num_layers, module._state_sizes(), module.hidden_size, module._step_nonlinearity()
    )
