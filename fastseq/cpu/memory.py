"""Tensors as the C++ kernels take them: checked sizes, addresses, strides.

``torch.ops.fastseq.*`` can be called past the public functions' checks, so a launcher checks again what memory safety
needs: every tensor is on the CPU and has the size and dtype that the kernel will assume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu

#: (T, B, I, H, P) of one layer.
Sizes = tuple[int, int, int, int, int]

STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def expect(tensors: Iterable[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]]) -> None:
    """Checks ``(name, tensor or None, shape, dtype)`` rows.

    Raises:
        ValueError: a tensor has another shape, dtype or device than the kernel assumes.
    """
    for name, tensor, shape, dtype in tensors:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu"):
            got = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: the kernel expects {list(shape)} {dtype} on cpu, got {got}")


def storage_of(x: Tensor) -> int:
    """The kernel's code of a tensor's dtype.

    Raises:
        TypeError: there are no kernels for that dtype.
    """
    code = STORAGE.get(x.dtype)
    if code is None:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    return code


_Dense = TypeVar("_Dense", Tensor, Tensor | None)


def dense(tensor: _Dense) -> _Dense:
    """The tensor with its numbers side by side in row-major order; None stays None."""
    return None if tensor is None else tensor.contiguous()


def dense_rows(tensor: Tensor) -> Tensor:
    """A ``[T, B, ·]`` tensor whose last dimension is dense; its strides over time and batch may be anything."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    """Where the numbers begin; 0 for None and for an empty tensor, which stands for one not wanted."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def time_strides(tensor: Tensor | None) -> tuple[int, int]:
    """The strides of a ``[T, B, ·]`` tensor over time and batch, in numbers; zeros for None."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


#: Below this size torch's own allocator is as good.
LARGE_BYTES = 1 << 22


def new_output(example: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """Undefined memory that becomes the user's: torch's own, with huge pages asked for where it is large."""
    made = example.new_empty(shape, dtype=dtype)
    if made.nbytes >= LARGE_BYTES:
        _cpu.advise_huge_pages(made.data_ptr(), made.nbytes)
    return made


def new_tape(example: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Undefined memory for a tape. Large ones come from a pool: as many fresh pages would cost more than the kernel."""
    count = math.prod(shape)
    if count * dtype.itemsize < LARGE_BYTES:
        return example.new_empty(shape, dtype=dtype)
    return torch.frombuffer(_cpu.Block(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def new_gradients(wanted: Iterable[tuple[object, Tensor | None]], example: Tensor | None = None) -> tuple[Tensor, ...]:
    """Memory for the gradients of ``(wanted or not, tensor)`` rows; shape ``[0]`` for those not wanted or None.

    All are of the dtype of ``example``, or of the first tensor.
    """
    rows = tuple(wanted)
    if example is None:
        example = next(tensor for _, tensor in rows if tensor is not None)
    return tuple(new_output(example, t.shape if want and t is not None else (0,)) for want, t in rows)
