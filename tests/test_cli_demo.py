"""``python -m fastseq demo`` in a few steps: what it prints and writes, and that it tells models apart."""

import json
import math
import re

import pytest
import torch

from fastseq.cli import demo
from fastseq.cli.main import main


def test_few_steps(tmp_path, capsys):
    picture, target = tmp_path / "curves.png", tmp_path / "demo.json"
    argv = [
        "demo",
        "--only",
        "recurrent",
        "--steps",
        "12",
        "--hidden",
        "24",
        "--out",
        str(picture),
        "--json",
        str(target),
    ]
    assert main(argv) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "they agree to rounding" in printed
    assert "fastseq against nn.LSTM" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(target.read_text())
    assert data["settings"]["steps"] == 12
    assert data["losses"].keys() == {"nn.LSTM", "fastseq"}
    assert all(len(losses) == 12 and losses[-1] < losses[0] for losses in data["losses"].values())
    assert data["agreement"]["ok"]
    assert data["ratio"] > 0
    assert data["sample"].startswith("The ")
    assert len(data["sample"]) == 324


def test_a_budget_stops_both_models_at_the_same_step(tmp_path, capsys):
    target = tmp_path / "demo.json"
    argv = [
        "demo",
        "--only",
        "recurrent",
        "--steps",
        "1000",
        "--hidden",
        "8",
        "--seconds",
        "0.001",
        "--out",
        str(tmp_path / "demo.png"),
    ]
    assert main([*argv, "--json", str(target)]) == 0
    assert f"Stopped after {demo.BLOCK} of 1000 steps" in capsys.readouterr().out
    losses = json.loads(target.read_text())["losses"]
    assert {len(curve) for curve in losses.values()} == {demo.BLOCK}


def test_a_model_that_differs_is_caught(tmp_path, capsys, monkeypatch):
    def spoil(module):
        with torch.no_grad():
            module.recurrent.weight_hh_l0.mul_(1.5)
        return module

    monkeypatch.setattr("fastseq.convert", spoil)
    assert (
        main(["demo", "--only", "recurrent", "--steps", "2", "--hidden", "8", "--out", str(tmp_path / "demo.png")]) == 1
    )
    assert "they do not agree" in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["curves", "curves.docx"])
def test_a_picture_of_unknown_kind(name, tmp_path, capsys):
    assert main(["demo", "--only", "recurrent", "--out", str(tmp_path / name)]) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err


def test_a_loss_that_is_nan_does_not_agree():
    curves = [
        demo.Trainer(name, demo.CharacterModel(3, 4), [1.0, last]) for name, last in (("a", 2.0), ("b", math.nan))
    ]
    right, wrong = curves
    assert demo.agreement(right, right, right).ok
    assert not demo.agreement(wrong, right, right).ok


def test_stretches_cover_everything_once():
    for length in (1, 9, 10, 11, 400):
        parts = demo.stretches(length, 10)
        assert [index for part in parts for index in range(length)[part]] == list(range(length))


def test_sparkline():
    assert demo.sparkline([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█"
    assert demo.sparkline([2.0, 2.0], 2.0, 2.0) == "▁▁"


def test_text_splits_into_characters():
    text = demo.Text.load()
    assert len(text.train) > 300_000
    assert int(torch.cat([text.train, text.held_out]).max()) == len(text.alphabet) - 1
    tokens, targets = next(text.batches(0))
    assert tokens.shape == targets.shape == (demo.WINDOW, demo.BATCH)
    assert torch.equal(tokens[1:], targets[:-1])
