"""``python -m benchmarks.gpu`` on the CPU: everything but the device, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (it is optional)")
ROOT = Path(__file__).resolve().parents[1]


def test_dry_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--no-build", "--out", str(tmp_path), "--limit", "300"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["problems"] == []
    assert results["tests"] in ("none ran", "passed")
    assert {row["case"].split()[0] for row in results["rows"]} == {"lstm", "rnn"}
    assert {row["mode"] for row in results["rows"]} == {"forward", "training"}
    assert all(row["ratio"]["median"] > 0 and row["plans"]["backward"] for row in results["rows"])
    assert [row["name"] for row in results["floors"]] == [
        "barrier of 1 programs, counter",
        "barrier of 1 programs, flags",
    ]
    assert [row["op"] for row in results["clustering"]] == [
        "loss and gradients, freq",
        "loss and gradients, target",
        "assignment",
        "nearest centre",
    ]
    assert all(row["ms"]["fastseq"]["median"] > 0 for row in results["clustering"])
    assert results["variants"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "floors.png",
        "gpu.json",
        "gpu.md",
        "log.txt",
        "speed.png",
    ]
    assert "dry run" in (tmp_path / "gpu.md").read_text()
