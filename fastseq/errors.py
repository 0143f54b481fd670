"""The one exception class of fastseq."""

from __future__ import annotations


class ShapeError(ValueError, RuntimeError):
    """An argument has the wrong rank, size or range; the message names it, what was expected and what came.

    It is both a ``ValueError`` and a ``RuntimeError``, since ``torch.nn`` raises one for some of these mistakes and the
    other for the rest: an ``except`` clause written for ``torch.nn.LSTM`` catches it either way.
    """
