"""fastseq: fast, exact recurrent networks for PyTorch."""

import torch  # noqa: F401  # first: the C++ kernels share the OpenMP runtime that torch has loaded

from fastseq import diagnostics, functional, init, models, reference, testing
from fastseq._info import info
from fastseq._version import __version__
from fastseq.errors import ShapeError
from fastseq.nn import LSTM, RNN, LSTMCell, RNNCell, RNNStates, States
from fastseq.nn.convert import convert, patch, to_torch

__all__ = [
    "LSTM",
    "RNN",
    "LSTMCell",
    "RNNCell",
    "RNNStates",
    "ShapeError",
    "States",
    "__version__",
    "convert",
    "diagnostics",
    "functional",
    "info",
    "init",
    "models",
    "patch",
    "reference",
    "testing",
    "to_torch",
]
