"""The options of a recurrence as the C++ kernels take them: what is there, as addresses and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastseq.cpu.extension import _cpu
from fastseq.cpu.memory import address, new_output

#: By the names of ``LayerOptions`` in csrc/cpu/params.h. What is None, False, 0 or an empty tensor is not asked for.
Given = Mapping[str, Tensor | float | bool | None]


class KernelOptions:
    """Options for one call of a kernel.

    Attributes:
        handle: what the kernel takes; None where no option is used, so that it runs as the plain layer.
    """

    def __init__(self, given: Given) -> None:
        self.handle: Any = None
        self._kept: list[Tensor] = []  # dense copies, which must outlive the call
        for name, value in given.items():
            if isinstance(value, Tensor):
                dense = value.contiguous()
                self._kept.append(dense)
                value = address(dense)
            if value:
                self.handle = self.handle or _cpu.Options()
                setattr(self.handle, name, value)


def per_step(rows: Tensor | None) -> bool:
    """Whether a reset state ``[1 or T, B, ·]`` has a row for every step."""
    return rows is not None and rows.shape[0] > 1


def reset_gradient(wanted: object, rows: Tensor | None, example: Tensor) -> Tensor:
    """Memory for the gradient of a reset state: zeros where steps that take none would leave theirs unwritten."""
    if rows is None or not wanted:
        return example.new_empty(0)
    return (
        torch.zeros_like(rows, memory_format=torch.contiguous_format)
        if per_step(rows)
        else new_output(rows, rows.shape)
    )
