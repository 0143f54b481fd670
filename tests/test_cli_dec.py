"""``python -m fastseq dec``: what it writes, prints and refuses, Ctrl-C and resume, two processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dec_cases import points

from fastseq.cli.main import main
from fastseq.cluster import DEC

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # the problems are tiny
FEW = ["--epochs", "2", "--steps", "20", "--update-interval", "10", "--hidden", "16", "--seed", "0"]


def command(*arguments):
    return [sys.executable, "-m", "fastseq", "dec", *map(str, arguments)]


def test_digits_as_a_subprocess(tmp_path):
    out, target = tmp_path / "out", tmp_path / "dec.json"
    done = subprocess.run(
        command(*FEW, "--out", out, "--json", target), env=ONE_THREAD, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pretraining 5 of 5: 100%" in done.stderr
    assert "k-means of the data: accuracy 0.7" in done.stdout
    wanted = "labels.csv centers.npy history.json embedding.png history.png top.png reconstructions.png"
    assert {path.name for path in out.iterdir()} == {*wanted.split(), "model.safetensors", "report.md"}
    with (out / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1797
    model = DEC.load(out / "model.safetensors")
    assert [int(row["cluster"]) for row in rows] == model.labels_.tolist()
    assert np.load(out / "centers.npy").shape == (10, 10)
    assert [entry["step"] for entry in json.loads((out / "history.json").read_text())["clustering"]] == [0, 10, 20]
    facts = json.loads(target.read_text())
    assert sum(facts["sizes"]) == 1797
    report = (out / "report.md").read_text()
    assert f"| DEC | {facts['scores']['DEC']['accuracy']:.4f} |" in report
    for picture in ("embedding", "history", "top", "reconstructions"):
        assert f"![{picture}]({picture}.png)" in report
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_file_with_and_without_labels(tmp_path, capsys):
    x, y = points()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    arguments = ["dec", "--data", str(tmp_path / "x.npy"), "--clusters", "3", *FEW, "--out", str(tmp_path / "a")]
    assert main(arguments) == 0
    assert "150 points in 3 clusters" in capsys.readouterr().out
    assert "accuracy" not in (tmp_path / "a" / "report.md").read_text()
    assert not (tmp_path / "a" / "top.png").exists()
    assert main([*arguments, "--labels", str(tmp_path / "y.npy")]) == 0  # goes on from the end
    assert "DEC: accuracy" in capsys.readouterr().out
    assert main([*arguments, "--alpha", "2"]) == 2
    assert "alpha: expected 1.0, as in" in capsys.readouterr().err
    assert main([*arguments, "--alpha", "2", "--fresh"]) == 0


def test_refusals(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "x.npy", points()[0])
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--data", "cifar"], "--data: expected one of digits, mnist"),
        (["--data", str(tmp_path / "none.npy")], "--data: cannot read"),
        (["--data", str(tmp_path / "flat.npy")], r"--data: expected an array [N, d]"),
        (["--data", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "flat.npy")], "--labels: expected shape [150]"),
        (["--labels", str(tmp_path / "flat.npy")], "--labels: digits has its own"),
        (["--data", "mnist", "--data-dir", str(tmp_path / "none")], "data_dir: expected a folder"),
        (["--out", str(tmp_path / "file")], "--out: cannot make the folder"),
        (["--data", str(tmp_path / "x.npy"), "--clusters", "200"], "n_clusters: expected at most n_samples=150"),
    ):
        assert main(["dec", "--out", str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_interrupted_and_taken_up_again(tmp_path):
    """Ctrl-C in the middle, and the same command once more: the result of a run that was not interrupted."""
    np.save(tmp_path / "x.npy", points(600)[0])
    arguments = ["--data", tmp_path / "x.npy", "--clusters", 3, "--hidden", 16, "--epochs", 150, "--steps", 20]
    arguments += ["--update-interval", 10]
    process = subprocess.Popen(
        command(*arguments, "--out", tmp_path / "a"), stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    seen, deadline = "", time.monotonic() + 200
    while "loss=" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    seen += process.communicate()[1]
    assert process.returncode == 130, seen
    assert "interrupted" in seen
    for folder in ("a", "b"):
        assert main(["dec", *map(str, arguments), "--out", str(tmp_path / folder)]) == 0
    assert (tmp_path / "a" / "labels.csv").read_bytes() == (tmp_path / "b" / "labels.csv").read_bytes()
    assert (tmp_path / "a" / "history.json").read_bytes() == (tmp_path / "b" / "history.json").read_bytes()


@pytest.mark.full
def test_two_processes(tmp_path):
    np.save(tmp_path / "x.npy", points()[0])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fastseq",
        "dec",
    ]
    launch += ["--data", str(tmp_path / "x.npy"), "--clusters", "3", *FEW, "--out", str(tmp_path / "out")]
    done = subprocess.run(launch, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("150 points in 3 clusters") == 1
    assert Path(tmp_path / "out" / "report.md").exists()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_digits_beat_k_means(tmp_path, seed):
    target = tmp_path / "dec.json"
    start = time.perf_counter()
    assert main(["dec", "--seed", str(seed), "--out", str(tmp_path / "out"), "--json", str(target)]) == 0
    facts = json.loads(target.read_text())
    assert facts["scores"]["DEC"]["accuracy"] >= 0.80
    assert facts["scores"]["DEC"]["accuracy"] > facts["scores"]["k-means of the data"]["accuracy"]
    assert time.perf_counter() - start < 60
