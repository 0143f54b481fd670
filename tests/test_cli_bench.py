"""``python -m fastseq bench`` on one small case: what it measures, and that it checks before it times."""

import json

import pytest
import torch

from fastseq.cli import bench, timing
from fastseq.cli.main import main

SMALL = (
    bench.Case("lstm", 5, 3, 4, 6, layers=2),
    bench.Case("lstm", 5, 3, 4, 6, proj_size=2, lengths=True),
    bench.Case("lstm", 5, 3, 4, 6, dtype="float64"),
    bench.Case("rnn", 5, 3, 4, 6, nonlinearity="relu"),
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "CASES", SMALL)
    monkeypatch.setattr(timing, "TARGET_SECONDS", 1e-4)


def test_rows(tmp_path, capsys):
    target = tmp_path / "bench.json"
    assert main(["bench", "--rounds", "3", "--json", str(target)]) == 0
    data = json.loads(target.read_text())
    assert len(data["rows"]) == 2 * len(SMALL)
    assert data["environment"]["threads"] == torch.get_num_threads()
    rows = [bench.row_from_json(row) for row in data["rows"]]
    assert [row.case for row in rows[::2]] == list(SMALL)
    for row in rows:
        for spread in (row.torch_ms, row.fastseq_ms, row.ratio):
            assert 0 < spread.p20 <= spread.median <= spread.p80
    assert "uneven" in capsys.readouterr().out


def test_selection(tmp_path):
    target = tmp_path / "bench.json"
    assert main(["bench", "--rounds", "1", "--op", "rnn", "--first", "1", "--json", str(target)]) == 0
    assert {row["case"]["op"] for row in json.loads(target.read_text())["rows"]} == {"rnn"}


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    def spoil(module):
        with torch.no_grad():
            module.weight_hh_l0[0, 0] += 1e-3
        return module

    monkeypatch.setattr("fastseq.convert", spoil)
    assert main(["bench", "--rounds", "1", "--first", "1"]) == 1
    printed = capsys.readouterr().out
    assert "results disagree, nothing timed" in printed
    assert "ratio" not in printed


def test_interleaved_rounds_alternate(monkeypatch):
    monkeypatch.setattr(timing, "TARGET_SECONDS", 0.0)
    order: list[str] = []
    samples = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 4)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab" + "ba"


def test_quantiles():
    assert timing.quantiles([3.0, 1.0, 2.0]) == timing.Quantiles(median=2.0, p20=1.4, p80=2.6)
    assert timing.quantiles([7.0]) == timing.Quantiles(7.0, 7.0, 7.0)
