"""Pictures: that they are written, and that they show what they should."""

import numpy as np
import pytest
import torch

from fastseq import plots


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_embedding(tmp_path, size):
    z, labels = torch.randn(40, size), np.arange(40) % 3
    assert is_png(plots.plot_embedding(z, labels, tmp_path / "a.png", centers=torch.randn(3, size)))


def test_history(tmp_path):
    history = {
        "pretraining": [{"epoch": 1.0, "loss": 0.5}],
        "clustering": [{"step": float(step), "loss": 0.1, "changed": 0.0} for step in (0, 10, 20)],
    }
    assert is_png(plots.plot_history(history, tmp_path / "a.png"))


def test_top_examples_are_the_most_confident_of_their_cluster(tmp_path, monkeypatch):
    q = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45]])
    x = np.arange(4)[:, None] * np.ones((1, 6))
    drawn = []
    monkeypatch.setattr(plots, "_grid", lambda rows, *rest: drawn.extend(row[:, 0].tolist() for row in rows))
    plots.plot_top_examples(x, q, (2, 3), tmp_path / "a.png", count=2)
    assert drawn == [[0, 1], [2]]
    monkeypatch.undo()
    assert is_png(plots.plot_top_examples(x, q, (2, 3), tmp_path / "a.png", count=2))


def test_reconstructions_and_strip(tmp_path):
    x = torch.rand(5, 6)
    assert is_png(plots.plot_reconstructions(x, x, (2, 3), tmp_path / "a.png"))
    assert is_png(plots.plot_interpolation(x, (2, 3), tmp_path / "b.png"))
    with pytest.raises(ValueError, match="x: expected 2 dimensions"):
        plots.plot_reconstructions(x[0], x, (2, 3), tmp_path / "a.png")
