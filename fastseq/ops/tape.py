"""What a forward leaves for its backward: the one place that knows the shapes and the dtype of that tape.

The tape is opaque to everything but kernels and reference:

- ``c [T, B, Hp]``, the cell state of every step;
- ``gates [T, B, 4 Hp + 16]``, the gates after activation, gate ``g`` (order i, f, g, o) of unit ``u`` in column
  ``g * Hp + u``;

or, of an Elman layer,

- ``slopes [T, B, Hp + 16]``, the derivative f'(a_t) of the nonlinearity: made from a_t, since where f saturates its
  value no longer tells the slope, least of all in half types;

with Hp the hidden size rounded up to :data:`LANES`, so that a kernel works on whole vectors and never has a remainder
loop. The columns beyond are finite but undefined. Both are in :func:`accumulate_dtype`.

A forward's argument ``save`` asks for a tape: :data:`KEEP`, or :data:`ANY_ORDER`, which leaves it to the kernel to keep
the batch in another order than the caller's, such as that of the sequences' lengths. The C++ kernels write behind the
gates of each row of the first step how far its sequence is from there in the caller's order; others leave zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.ops.flags import PADDING

LANES = 16

KEEP = 1
#: Only where the very same rows come to the backward: neither to whoever reads the tape, nor to vmap, which may take
#: apart again what it had folded into one batch.
ANY_ORDER = 2


def padded(hidden: int) -> int:
    """The hidden size rounded up to a whole number of vectors (Hp)."""
    return (hidden + LANES - 1) // LANES * LANES


def tape_shapes(steps: int, batch: int, hidden: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes of ``c`` and ``gates`` for T = ``steps``, B = ``batch``, H = ``hidden``."""
    width = padded(hidden)
    return (steps, batch, width), (steps, batch, 4 * width + LANES)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, cell states and the tape are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slopes_shape(steps: int, batch: int, hidden: int) -> tuple[int, int, int]:
    """The shape of an Elman layer's tape: f'(a_t) of unit ``u`` in column ``u``."""
    return steps, batch, padded(hidden) + LANES


def states_of(c: Tensor, gates: Tensor, hidden: int, flags: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cell states ``[T, B, H]`` and gates ``[T, B, 4H]`` of an LSTM's tape in ``dtype``, zero past each end."""
    c = c[..., :hidden]
    gates = gates[..., :-LANES].unflatten(-1, (4, -1))[..., :hidden].flatten(-2)
    if flags is not None:
        padding = ((flags & PADDING) != 0).unsqueeze(-1)
        c, gates = c.masked_fill(padding, 0), gates.masked_fill(padding, 0)
    return c.to(dtype), gates.to(dtype)
