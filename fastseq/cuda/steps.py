"""The regime ``cell``: what its launchers share. Each step is one product by cuBLAS and one fused kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastseq.cpu.memory import address
from fastseq.ops.flags import CUT


def in_time(steps: int, reverse: bool) -> Iterator[tuple[int, int | None]]:
    """``(t, t of the step after)`` in the order of the direction; the last step has None after it."""
    order = range(steps - 1, -1, -1) if reverse else range(steps)
    yield from zip(order, [*order[1:], None], strict=True)


def row(tensor: Tensor | None, t: int | None) -> int:
    """The address of step ``t`` of a ``[T, B, ·]`` tensor; 0 where there is no tensor or no step."""
    return 0 if tensor is None or t is None else tensor[t].data_ptr()


def stream_of(tensor: Tensor) -> int:
    """The handle of the current stream of a tensor's device; 0 on a CPU, for the emulator."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def first_operand(h0: Tensor, flags: Tensor | None, first: int) -> tuple[Tensor, int]:
    """What the first step's product reads, and the address that later kernels write the next one's operand to: memory
    of its own where flags may cut, else 0 and the carried state itself."""
    if flags is None:
        return h0, 0
    operand = h0.masked_fill((flags[first] & CUT).bool().unsqueeze(1), 0.0)
    return operand, address(operand)
