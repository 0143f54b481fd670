"""Step flags: the one form in which time structure (``lengths`` and ``reset``) reaches a kernel.

A ``uint8 [T, B]`` array, made for the direction of the op: bit 0 (:data:`CUT`) says that this step starts from the
reset state (zero, unless one is given) instead of the carried one, so that no gradient crosses; bit 1
(:data:`PADDING`) says that the step lies past the end of its sequence, so that the state is carried through it and the
output is zero. Padding is always a suffix in time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.ops.checks import check_kinds, check_time, refuse_shape

CUT = 1
PADDING = 2


def checked_flags(x: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor | None:
    """:func:`step_flags` for input ``x [T, B, I]``, after the checks of both arguments.

    Raises:
        TypeError, fastseq.ShapeError: as :func:`fastseq.ops.checks.check_time`, or ``x`` is not what it should be.
    """
    check_kinds((("x", x),), frozenset())
    if x.dim() != 3:
        refuse_shape("x", "shape [T, B, I]", x.shape)
    steps, batch = x.shape[:2]
    check_time(lengths, reset, steps, batch)
    return step_flags(lengths, reset, steps, batch, reverse, x.device)


def step_flags(
    lengths: Tensor | None, reset: Tensor | None, steps: int, batch: int, reverse: bool, device: torch.device
) -> Tensor | None:
    """Flags for one direction, or None when neither ``lengths`` nor ``reset`` is given.

    Args:
        lengths: integers ``[B]``, the number of valid steps of each sequence.
        reset: bool ``[T, B]``, true where a new episode starts. The cut lies between ``t`` and ``t - 1`` in either
            direction, so that in reverse it is step ``t - 1`` that starts from the zero state. A start in the padding
            cuts nothing.
        steps: T.
        batch: B.
        reverse: whether the op runs from the last step to the first.
        device: where the flags are wanted.

    Returns:
        ``uint8 [T, B]``, or None.
    """
    valid = None
    if lengths is not None:
        time = torch.arange(steps, device=device)
        valid = time.unsqueeze(1) < lengths.to(device).unsqueeze(0)  # [T, B]
    if reset is None:
        return None if valid is None else torch.where(valid, 0, PADDING).to(torch.uint8)
    starts = reset.to(device)
    if valid is not None:
        starts = starts & valid
    if reverse:
        starts = torch.cat([starts[1:], torch.zeros_like(starts[:1])])
    flags = starts.to(torch.uint8)
    return flags if valid is None else flags + torch.where(valid, 0, PADDING).to(torch.uint8)
