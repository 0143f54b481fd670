"""Processes that the GPU benchmark starts, several side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]


class Children:
    """Some processes at once, with ``environment`` beside their own. Each writes into a file of its own, so that their
    lines do not mix, and is a group of its own, so that what it has started ends with it."""

    def __init__(self, commands: list[list[str]], environment: dict[str, str] | None = None) -> None:
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        everything = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self.running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        for command in commands:
            output = tempfile.TemporaryFile()  # noqa: SIM115 (open until its child has ended)
            child = subprocess.Popen(
                command, cwd=ROOT, env=everything, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.running.append((child, output))

    def end(self, seconds: float, log: IO[str]) -> list[int | None]:
        """Waits so long at most, and copies what they wrote into the log: the exit statuses, None where killed."""
        deadline = time.monotonic() + seconds
        statuses: list[int | None] = []
        for child, output in self.running:
            try:
                statuses.append(child.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                statuses.append(None)
            output.seek(0)
            log.write(output.read().decode(errors="replace"))
            output.close()
        log.flush()
        self.running = []
        return statuses


def shares(module: list[str], most: int = 8) -> list[list[str]]:
    """A command for each share of the work, ``I/N`` at its end: a process for every two cores."""
    count = max(1, min(most, (os.cpu_count() or 1) // 2))
    return [[sys.executable, "-m", *module, f"{number}/{count}"] for number in range(count)]
