"""Checkpoints: what goes in comes out, bit for bit, and a kill never leaves half a file."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from fastseq import checkpoint


def test_nesting_comes_back(tmp_path):
    state = {
        "a": torch.arange(6.0).reshape(2, 3).t(),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "array": np.arange(4, dtype=np.uint8),
        "list": [1, 2.5, "x", None, True, (1, {"deep": torch.zeros(0, 3)})],
        7: {"tensor": 1, "dict": 2},
        "odd": [0.1 + 0.2, math.inf, -0.0, 2**70],
        "number": np.float64(0.25),
    }
    checkpoint.save(tmp_path / "c.safetensors", state)
    got = checkpoint.load(tmp_path / "c.safetensors")
    assert list(got) == list(state)
    for name in ("a", "half", "scalar"):
        assert got[name].dtype == state[name].dtype
        assert torch.equal(got[name], state[name])
    assert isinstance(got["array"], np.ndarray)
    assert got["array"].tolist() == [0, 1, 2, 3]
    assert got["list"][:5] == [1, 2.5, "x", None, True]
    assert got["list"][4] is True
    assert isinstance(got["list"][5], tuple)
    assert got["list"][5][1]["deep"].shape == (0, 3)
    assert got[7] == {"tensor": 1, "dict": 2}
    assert got["odd"] == state["odd"]
    assert math.copysign(1, got["odd"][2]) == -1
    assert got["number"] == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_training_goes_on_with_the_same_bits(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        return model, torch.optim.Adam(model.parameters())

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(1)
    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": checkpoint.random_states()}
    checkpoint.save(tmp_path / "c.safetensors", state)
    for _ in range(3):
        step(model, optimizer)
    torch.manual_seed(2)
    again, optimizer = make()
    state = checkpoint.load(tmp_path / "c.safetensors")
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    checkpoint.restore_random_states(state["random"])
    for _ in range(3):
        step(again, optimizer)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_shared_memory_is_written_twice(tmp_path):
    weight = torch.arange(3.0)
    checkpoint.save(tmp_path / "c", {"a": weight, "b": weight, "view": weight[1:]})
    got = checkpoint.load(tmp_path / "c")
    assert got["view"].tolist() == [1.0, 2.0]
    assert got["a"].tolist() == got["b"].tolist() == [0.0, 1.0, 2.0]


def test_refusals(tmp_path):
    with pytest.raises(TypeError, match=r"state\.a\.1: expected tensors"):
        checkpoint.save(tmp_path / "c", {"a": [1, object()]})
    with pytest.raises(TypeError, match="keys that are str or int"):
        checkpoint.save(tmp_path / "c", {"a": {1.5: 2}})
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"not this")
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoint.load(tmp_path / "bad")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a checkpoint of fastseq"):
        checkpoint.load(tmp_path / "other")


def test_killed_while_it_writes(tmp_path):
    """A process that does nothing but write checkpoints is killed: what it leaves can be read, and is consistent."""
    code = (
        "import itertools, sys, torch\nfrom fastseq import checkpoint\n"
        "for n in itertools.count(1):\n"
        "    checkpoint.save(sys.argv[1], {'n': n, 'x': torch.full((1 << 20,), float(n))})\n"
    )
    path = tmp_path / "c.safetensors"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = checkpoint.load(path)
    assert torch.equal(state["x"], torch.full((1 << 20,), float(state["n"])))


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"a checkpoint needs the package 'safetensors'.*fastseq\[train\]"):
        checkpoint.save(tmp_path / "c", {})
