"""Ctrl-C at a moment of one's own choice: a training finishes its step and leaves a checkpoint before it stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def deferred(on: bool = True) -> Iterator[Interrupt]:
    """Within it, the first Ctrl-C only sets ``asked``; a second one interrupts at once, as ever.

    The body looks at ``asked`` where it can stop, and raises KeyboardInterrupt. Off, or outside the main thread, where
    Python takes no signal handlers, nothing changes.
    """
    interrupt = Interrupt()
    if not on or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
