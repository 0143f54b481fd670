"""Packages that only parts of the library need: imported when used, with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ModuleNotFoundError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(name: str, extra: str, purpose: str) -> ModuleType:
    """Imports the optional package ``name`` (or a module inside it) for ``purpose``.

    Raises:
        MissingExtraError: naming the package, what wanted it, and the extra of fastseq that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, but something inside it is missing: that message is the useful one
        raise MissingExtraError(
            f"{purpose} needs the package '{package}', which is not installed: pip install 'fastseq[{extra}]'",
            name=error.name,
        ) from None
