"""The extension module ``fastseq._cuda``, or None where it was not built.

One that is there and does not load raises here, since a broken build must not look like a slow one. Loading it asks for
no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_cuda: Any = None if importlib.util.find_spec("fastseq._cuda") is None else importlib.import_module("fastseq._cuda")


def extension() -> Any:
    """The module in use: ``fastseq._cuda``, or the emulator where tests have put it in its place.

    Raises:
        RuntimeError: there is none.
    """
    if _cuda is None:
        raise RuntimeError("the extension fastseq._cuda was not built: see FASTSEQ_CUDA in CONTRIBUTING.md")
    return _cuda
