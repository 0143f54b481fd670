"""The extension module ``fastseq._cpu``, or None where it was never built.

One that is there and does not load raises here, since a broken build must not look like a slow one.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch  # noqa: F401  (loads the OpenMP runtime that the extension shares)

_cpu: Any = None if importlib.util.find_spec("fastseq._cpu") is None else importlib.import_module("fastseq._cpu")
