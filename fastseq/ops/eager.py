"""Calls past the dispatcher: where nothing records, transforms or replaces operations, a kernel may be called as it is.

The way through the dispatcher, twice for a forward with a gradient, costs tens of microseconds; a small layer's kernel
takes as many.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastseq import cpu
from fastseq.ops import dispatch

PLAIN_TYPES = (Tensor, torch.nn.Parameter)

_keys = torch._C._dispatch_keys


def _plain_keys() -> frozenset[int]:
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    return frozenset(_keys(tensor).raw_repr() for tensor in (torch.empty(0, device="cpu"), inference))


# All that the dispatcher would look at: no negation or conjugation pending, neither sparse nor nested nor batched, …
_PLAIN_KEYS = _plain_keys()


def is_eager() -> bool:
    """Whether nothing records, transforms or replaces operations, and no other kernels than C++ are forced.

    Not to be asked while ``torch.compile`` traces.
    """
    return (
        not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._is_tracing()
        and not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        and forward_ad._current_level < 0
        and dispatch.forced() in (None, "cpp")
    )


def are_plain(*values: Tensor | None) -> bool:
    """Whether all but None are dense tensors on the CPU, of no subclass, that hold their numbers as they are."""
    for value in values:
        if value is not None and not (type(value) in PLAIN_TYPES and _keys(value).raw_repr() in _PLAIN_KEYS):
            return False
    return True


def may_call(*values: Tensor | None) -> bool:
    """Whether a kernel may be called with these tensors past the dispatcher."""
    return not torch.compiler.is_compiling() and cpu.available() and is_eager() and are_plain(*values)
