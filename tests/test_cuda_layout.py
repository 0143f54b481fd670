"""Who holds what in the CUDA kernels: ``csrc/tests/cuda_layout.cpp`` checks every index of every shape."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_index_has_one_owner(tmp_path: Path) -> None:
    program = tmp_path / "layout"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, str(CSRC / "tests" / "cuda_layout.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "every index has one owner" in done.stdout
