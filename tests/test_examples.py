"""The examples run as they stand, and what they print is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False)
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


def test_digits_are_read_as_well_as_by_torch() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
    accuracies = re.findall(r"(\S+): accuracy (\S+)", printed("digits_rows.py"))
    assert [name for name, _ in accuracies] == ["fastseq", "torch.nn"]
    ours, theirs = (float(value) for _, value in accuracies)
    assert ours > 0.9
    assert abs(ours - theirs) < 0.05  # three standard deviations of the difference over 360 digits


@pytest.mark.full
def test_the_forecast_is_that_of_torch() -> None:
    folder = os.environ.get("FASTSEQ_DATA")
    if folder is None or not (Path(folder) / "ett" / "ETTh1.csv").exists():
        pytest.skip("FASTSEQ_DATA names no folder with ett/ETTh1.csv")
    errors = [float(value) for value in re.findall(r"mean squared error (\S+)", printed("ett_forecast.py"))]
    last_value, ours, theirs = errors
    assert abs(ours - theirs) < 0.02 * theirs
    assert ours < last_value


def test_gradients_vanish_explode_are_clipped_and_carried(tmp_path: Path) -> None:
    out = printed("gradient_flow.py", tmp_path / "flow.png")
    first = [float(value) for value in re.findall(r"dL/dh‖ (\S+) at the first", out)]
    vanishing, exploding, clipped, lstm = first
    assert vanishing < 1e-5
    assert exploding > 1e6
    assert clipped <= 32.0  # 1 for each of 16 · 64 numbers
    assert lstm > 1.0
    assert (tmp_path / "flow.png").exists()


def test_the_adding_problem_runs(tmp_path: Path) -> None:
    out = printed("adding_problem.py", "--length", "20", "--steps", "20", "--every", "10", "--out", tmp_path / "a.png")
    assert out.count("|\n") == 5
    assert (tmp_path / "a.png").exists()
