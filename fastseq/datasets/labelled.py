"""What a loader returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Labelled(NamedTuple):
    """Points with the classes that people gave them, which clustering does not see: they serve to judge it."""

    data: NDArray[np.float32]  # [N, d], C-contiguous; a memory map where it is large
    labels: NDArray[np.int64]  # [N], from 0 to len(names) - 1
    names: tuple[str, ...]  # of the classes
    image_shape: tuple[int, int] | None = None  # rows, columns: how one point is drawn as a picture

    @classmethod
    def of(cls, data: Any, labels: Any, names: Any, image_shape: tuple[int, int] | None = None) -> Labelled:
        """Brings arrays of any dtype to these."""
        points = np.ascontiguousarray(data, dtype=np.float32)
        return cls(points, np.asarray(labels, dtype=np.int64), tuple(map(str, names)), image_shape)
