"""``python -m fastseq lm``, as a process: it trains, writes, judges, goes on after a kill, and refuses in one line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastseq import checkpoint
from fastseq.cli.main import main

SMALL = ["--hidden", "12", "--layers", "2", "--embedding", "8", "--batch", "4", "--window", "8", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog\n"]
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    assert main(["lm", "train", "--text", str(text), "--out", str(folder), "--epochs", "2", *SMALL]) == 0
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastseq", "lm", *map(str, arguments)]


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["lm", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastseq lm: ")
    assert error.count("\n") == 1
    return error


def test_train_generate_eval(text, tmp_path):
    folder, results = tmp_path / "model", tmp_path / "results.json"
    arguments = ["train", "--text", text, "--out", folder, "--epochs", 2, "--json", results, *SMALL]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per character" in done.stdout
    history = json.loads(results.read_text())["history"]
    assert [record["step"] for record in history] == [history[0]["step"], 2 * history[0]["step"]]
    written = [
        subprocess.run(
            command("generate", folder, "--prompt", "the q", "--length", 40, "--seed", 1),
            capture_output=True,
            text=True,
        )
        for _ in range(2)
    ]
    assert written[0].returncode == 0, written[0].stderr
    assert written[0].stdout == written[1].stdout
    assert written[0].stdout.startswith("the q")
    assert len(written[0].stdout) == 46


def test_eval_finds_what_training_found(text, trained, tmp_path, capsys):
    whole = text.read_text()
    (tmp_path / "end.txt").write_text(whole[len(whole) - int(len(whole) * 0.1) :])
    target = tmp_path / "eval.json"
    arguments = ["eval", trained, "--text", tmp_path / "end.txt", "--batch", 4, "--json", target]
    assert main(["lm", *map(str, arguments)]) == 0
    assert "perplexity" in capsys.readouterr().out
    saved = checkpoint.load(trained / "best.safetensors")["facts"]["evaluation"]
    assert json.loads(target.read_text())["nats"] == pytest.approx(saved["nats"], rel=1e-6)


def test_words(text, tmp_path, capsys):
    folder = tmp_path / "words"
    arguments = ["--level", "word", "--words", "7", "--epochs", "1", "--tie", "--hidden", "8", "--layers", "1"]
    assert main(["lm", "train", "--text", str(text), "--out", str(folder), *arguments, "--batch", "4"]) == 0
    assert "7 different" in capsys.readouterr().out
    assert main(["lm", "generate", str(folder), "--prompt", "the cat", "--length", "5", "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the <unk>")


def test_going_on_after_a_kill_gives_the_same_bits(text, tmp_path):
    settings = ["--text", text, "--epochs", 2, "--evaluate-every", 50, *SMALL]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    last = killed / "last.safetensors"
    process = subprocess.Popen(
        command("train", "--out", killed, *settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = checkpoint.load(last)["facts"]["place"]["step"]
    assert process.returncode == -signal.SIGKILL
    for arguments in (["--out", killed, "--resume", "--text", text], ["--out", whole, *settings]):
        done = subprocess.run(command("train", *arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    got, expected = checkpoint.load(last), checkpoint.load(whole / "last.safetensors")
    assert 0 < reached < expected["facts"]["place"]["step"]
    for part in ("model", "config", "vocabulary"):
        assert got[part].keys() == expected[part].keys()
    for name, value in expected["model"].items():
        assert torch.equal(got["model"][name], value), name
    for name in ("nats", "step", "training_nats"):
        histories = [[record[name] for record in each["facts"]["place"]["history"]] for each in (got, expected)]
        if name == "training_nats":  # the mean since the last evaluation, which a resumed training has whole
            assert histories[0] == pytest.approx(histories[1], rel=1e-6)
        else:
            assert histories[0] == histories[1]


def test_bad_texts(trained, tmp_path, capsys):
    empty, strange, binary = tmp_path / "empty.txt", tmp_path / "strange.txt", tmp_path / "binary.txt"
    empty.write_text("")
    strange.write_text("the quick brown fox ∂ jumps", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    out = tmp_path / "out"
    assert "expected text of at least 2 characters, got 0" in refused(["train", "--text", empty, "--out", out], capsys)
    assert "is not UTF-8 text: byte 0" in refused(["train", "--text", binary, "--out", out], capsys)
    missing = tmp_path / "missing.txt"
    assert "No such file" in refused(["train", "--text", missing, "--out", out], capsys)
    error = refused(["eval", trained, "--text", strange], capsys)
    assert f"{strange}: the character '∂' (U+2202) at position 20" in error
    assert "--prompt: the character 'Z'" in refused(["generate", trained, "--prompt", "Zoo"], capsys)
    assert "--prompt: expected at least one" in refused(["generate", trained, "--prompt", ""], capsys)
    assert not out.exists()


def test_bad_places(text, trained, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert "holds a training already" in refused(["train", "--text", text, "--out", trained], capsys)
    lost = tmp_path / "no" / "model"
    assert "there is no folder" in refused(["train", "--text", text, "--out", lost], capsys)
    assert "it is a file" in refused(["train", "--text", text, "--out", text], capsys)
    assert "no checkpoint" in refused(["train", "--text", text, "--out", tmp_path / "new", "--resume"], capsys)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert "not those that" in refused(["train", "--text", other, "--out", trained, "--resume"], capsys)
    assert "no checkpoint" in refused(["generate", tmp_path, "--prompt", "a"], capsys)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_permission(text, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(["train", "--text", text, "--out", tmp_path / "model"], capsys)


@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_broken_checkpoint(kept, trained, text, tmp_path, capsys):
    for name in ("best.safetensors", "last.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes()[:kept])
    assert "is not a safetensors file" in refused(["generate", tmp_path, "--prompt", "the"], capsys)
    assert "is not a safetensors file" in refused(["eval", tmp_path, "--text", text], capsys)
    assert "is not a safetensors file" in refused(["train", "--text", text, "--out", tmp_path, "--resume"], capsys)


def test_bad_settings(text, tmp_path, capsys):
    out = ["--text", text, "--out", tmp_path / "out"]
    assert "dropout" in refused(["train", *out, "--dropout", 2], capsys)
    assert "--words needs --level word" in refused(["train", *out, "--words", 10], capsys)
    assert "tie_weights" in refused(["train", *out, "--tie", "--embedding", 3], capsys)
    assert "warmup" in refused(["train", *out, "--warmup", -1], capsys)
    assert not (tmp_path / "out").exists()


def test_bad_sampling(trained, capsys):
    assert "temperature" in refused(["generate", trained, "--prompt", "t", "--temperature", -1], capsys)
    assert "top_p" in refused(["generate", trained, "--prompt", "t", "--top-p", 2], capsys)


@pytest.mark.parametrize("action", ["train", "generate", "eval"])
def test_help(action, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["lm", action, "--help"])
    assert stop.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


def test_missing_packages_are_named(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    error = refused(["generate", trained, "--prompt", "t"], capsys)
    assert "'safetensors'" in error
    assert "pip install 'fastseq[train]'" in error


def test_the_default_text_is_pythons_own(tmp_path, capsys):
    arguments = ["train", "--out", tmp_path / "model", "--seconds", 0.01, "--hidden", 8, "--layers", 1]
    assert main(["lm", *map(str, arguments)]) == 0
    assert "characters to learn" in capsys.readouterr().out
