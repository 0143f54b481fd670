"""The examples run as they stand, and what they print is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rl_reset_gives_the_same_numbers_in_both_forms() -> None:
    out = printed("rl_reset.py")
    found = re.search(r"(\d+) resets; outputs, states and gradients differ by at most (\S+)", out)
    assert found is not None, out
    assert int(found[1]) > 10
    assert float(found[2]) < 1e-5


def test_truncated_bptt_learns_across_windows() -> None:
    carried, thrown_away = (float(value) for value in re.findall(r"loss .*: +(\S+)", printed("truncated_bptt.py")))
    assert carried < 0.7 * thrown_away
