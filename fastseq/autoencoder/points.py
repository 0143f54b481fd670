"""Points in whatever holds them (array, memory map, tensor, Dataset), read a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastseq.errors import ShapeError

_SAMPLED = 64  # rows that the fingerprint reads


class Points:
    """N points of d features, of which only the batch at hand is in memory in the dtype of the training.

    Args:
        data: an array or memory map ``[N, d]`` of any real dtype, a tensor ``[N, d]``, or a torch ``Dataset`` with a
            length, whose items are rows ``[d]`` (or tuples that begin with one).
        dtype: of the batches.
        device: of the batches.

    Raises:
        TypeError: ``data`` is something else, or complex.
        fastseq.ShapeError: the wrong rank, no points, or no features.
    """

    def __init__(
        self, data: Any, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", name: str = "data"
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.data = data
        if isinstance(data, (np.ndarray, Tensor)):
            shape = tuple(data.shape)
        elif isinstance(data, IterableDataset) or not (isinstance(data, Dataset) and hasattr(data, "__len__")):
            raise TypeError(
                f"{name}: expected an array, a tensor or a torch Dataset that has a length, got {type(data).__name__}"
            )
        else:
            if len(data) == 0:
                raise ShapeError(f"{name}: expected at least one point, got an empty Dataset")
            shape = (len(data), *_row(data[0]).shape)
        if len(shape) != 2 or 0 in shape:
            raise ShapeError(f"{name}: expected shape [N, d] with N and d at least 1, got {list(shape)}")
        kind = data.dtype.is_complex if isinstance(data, Tensor) else getattr(data, "dtype", np.float32) in _COMPLEX
        if kind:
            raise TypeError(f"{name}: expected real numbers, got {data.dtype}")
        self.count: int = shape[0]
        self.features: int = shape[1]

    def __len__(self) -> int:
        return self.count

    def take(self, rows: Tensor) -> Tensor:
        """The points with these numbers (int64 ``[B]``, on the CPU): ``[B, d]``."""
        data = self.data
        if isinstance(data, Tensor):
            batch = data.detach().index_select(0, rows.to(data.device))
        elif isinstance(data, np.ndarray):
            batch = torch.from_numpy(np.ascontiguousarray(data[rows.numpy()]))
        elif hasattr(data, "__getitems__"):
            batch = torch.stack([_row(item) for item in data.__getitems__(rows.tolist())])
        else:
            batch = torch.stack([_row(data[row]) for row in rows.tolist()])
        return batch.to(self.device, self.dtype)

    def slice(self, start: int, stop: int) -> Tensor:
        """The points ``start`` … ``stop - 1``: ``[B, d]``."""
        data = self.data
        if isinstance(data, Tensor):
            return data.detach()[start:stop].to(self.device, self.dtype)
        if isinstance(data, np.ndarray):
            part = data[start:stop]
            if not part.flags.writeable or any(stride < 0 for stride in part.strides):
                part = part.copy()  # torch has no read-only tensors
            return torch.from_numpy(np.ascontiguousarray(part)).to(self.device, self.dtype)
        return self.take(torch.arange(start, min(stop, self.count)))

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """All points from ``start`` to ``stop`` in their own order, ``size`` at a time."""
        stop = self.count if stop is None else stop
        for first in range(start, stop, size):
            yield self.slice(first, min(first + size, stop))

    def fingerprint(self) -> str:
        """A digest of the sizes and of some rows, which tells one data set from another."""
        rows = torch.linspace(0, self.count - 1, min(_SAMPLED, self.count), dtype=torch.float64).round().long()
        sample = self.take(rows).to("cpu", torch.float64).contiguous().numpy()
        return hashlib.sha256(repr((self.count, self.features)).encode() + sample.tobytes()).hexdigest()


_COMPLEX = (np.complex64, np.complex128)


def _row(item: Any) -> Tensor:
    if isinstance(item, (tuple, list)):
        item = item[0]
    row = torch.as_tensor(item)
    if row.ndim != 1:
        raise ShapeError(f"data: expected a Dataset of rows of shape [d], got {list(row.shape)}")
    return row
