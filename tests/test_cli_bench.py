"""``python -m fastseq bench`` on small cases: what it measures, and that it checks before it times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_support import SMALL, row, run_of

from fastseq.cli import timing
from fastseq.cli.bench import cases, command, results, scaling
from fastseq.cli.main import main

COMMITTED = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CASES", SMALL)
    monkeypatch.setattr(timing, "TARGET_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)
    limits = {"fma_gflops": {"float32": 1.0, "float64": 1.0}, "read_gbytes": {}}
    monkeypatch.setattr("fastseq.cli.bench.peaks.measured", lambda threads: limits)
    monkeypatch.setattr("fastseq.cli.bench.peaks.fma_gflops", lambda dtype, threads: 10.0)
    monkeypatch.setattr("fastseq.cli.bench.peaks.read_gbytes", lambda size, threads: 10.0)


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    assert main(["bench", "--rounds", "3", "--no-memory", "--json", str(target)]) == 0
    run = results.load(target)
    assert [one.case for one in run.rows] == list(SMALL)
    assert run.environment["threads"] == torch.get_num_threads()
    for one in run.rows:
        assert one.rounds == 3
        assert "torch" in one.figures
        assert set(one.figures) | set(one.left_out) == {"torch", "onnxruntime", "openvino", "plain", "fastseq"}
        assert not set(one.figures) & set(one.left_out)
        assert ("torch" in one.ratios) == ("fastseq" in one.figures)
        for figures in one.figures.values():
            assert 0 < figures.ms.p20 <= figures.ms.median <= figures.ms.p80
            if one.case.mode != "first":  # whose samples have a shape each
                assert figures.gflops is not None
                assert figures.gflops > 0
                assert figures.percent is not None
                assert figures.limit == ("read" if one.case.B == 1 else "fma")
            assert (figures.first_over_warm is not None) == (one.case.mode == "first")
    # Only what does not exist yet may leave fastseq out.
    assert {one.case.mode for one in run.rows if "fastseq" in one.left_out} <= {"step"}
    printed = capsys.readouterr().out
    assert "uneven" in printed
    assert "left out: onnxruntime: inference only" in printed


def test_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--op", "rnn"]) == 0
    assert capsys.readouterr().out == "rnn_relu-5x3x4x6x1-float32-training\n"
    assert main(["bench", "--list", "--mode", "training", "--case", "reset-", "--case", "*lengths-training"]) == 0
    assert [line.split("-")[-2] for line in capsys.readouterr().out.splitlines()] == ["lengths", "reset"]
    assert main(["bench", "--case", "no such case"]) == 2
    assert "no case is selected" in capsys.readouterr().err


def test_wrong_results_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fastseq import testing

    rule = testing.compare_tensor

    def reject_weights(name: str, *tensors: torch.Tensor) -> testing.Comparison:
        found = rule(name, *tensors)
        return testing.Comparison(name, 1.0, 0.5, False) if "weight_hh" in name else found

    monkeypatch.setattr(testing, "compare_tensor", reject_weights)
    target = tmp_path / "bench.json"
    arguments = ["bench", "--rounds", "1", "--no-memory", "--case", "x2-float32", "--json", str(target)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "results disagree, not timed: lstm-5x3x4x6x2-float32-training: fastseq: gradient of weight_hh_l0" in printed
    assert [one.case.mode for one in results.load(target).rows] == ["forward"]


def test_update_keeps_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    common = ["bench", "--rounds", "1", "--no-memory", "--json", str(target), "--update"]
    assert main([*common, "--op", "rnn"]) == 0
    assert main([*common, "--case", "x2-float32-forward"]) == 0
    assert [one.case for one in results.load(target).rows] == [SMALL[0], SMALL[-1]]
    data = json.loads(target.read_text())
    data["environment"]["cpu"] = "another processor"
    target.write_text(json.dumps(data))
    assert main([*common, "--op", "rnn"]) == 2
    assert "do not belong with these: cpu 'another processor'" in capsys.readouterr().err


def test_compare_names_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"

    def write(path: Path, *ratios: float) -> None:
        run = run_of(row(case, ratio) for case, ratio in zip(SMALL, ratios, strict=False))
        path.write_text(json.dumps(results.to_json(run)))

    write(old, 2.0, 2.0, 2.0, 2.0)
    write(new, 1.0, 1.9, 3.0)
    assert main(["bench", "--results", str(new), "--compare", str(old)]) == 1
    printed = capsys.readouterr().out
    assert f"REGRESSION: {SMALL[0].key}: torch / fastseq 2.00 (1.80–2.20) then, 1.00 (0.90–1.10) now" in printed
    assert SMALL[1].key not in printed  # within the spread
    assert f"faster: {SMALL[2].key}" in printed
    assert "3 cases in both runs, 1 regressions" in printed
    assert main(["bench", "--results", str(new), "--compare", str(new)]) == 0


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BASE", SMALL[1])
    points = [("T", value, SMALL[0]) for value in (2, 4)] + [("threads", 1, SMALL[0])]
    monkeypatch.setattr(scaling, "cases", lambda threads: iter(points))
    picture = tmp_path / "speed.png"
    arguments = ["--rounds", "1", "--no-memory", "--op", "rnn", "--plot", str(picture)]
    assert main(["bench", *arguments]) == 0
    for path in (picture, tmp_path / "speed-scaling.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["cpu.json", "options.json"])
def test_every_library_of_the_committed_runs_is_drawn(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "speed.png"
    assert main(["bench", "--results", str(COMMITTED / name), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--update"], "--update needs --json FILE"),
        (["--results", "{old}"], "holds no benchmark results: expected a benchmark file of format"),
        (["--compare", "{missing}"], "cannot read"),
        (["--plot", "{missing}/x.png"], "cannot write"),
    ],
)
def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"environment": {}, "rows": []}')
    filled = [word.format(old=old, missing=tmp_path / "missing") for word in arguments]
    assert main(["bench", "--op", "rnn", *filled]) == 2
    assert message in capsys.readouterr().err


def test_quick_leaves_out_long_cases() -> None:
    long = cases.Case("lstm", "training", 512, 64, 512, 512)
    assert cases.select([long, SMALL[0]], quick=True) == [SMALL[0]]
    assert command.QUICK.rounds == timing.LEAST_ROUNDS


def test_interleaved_rounds_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TARGET_SECONDS", 0.0)
    order: list[str] = []
    samples = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 4)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"


def test_interleaved_settles_each_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[str] = []
    timed: list[tuple[str, int]] = []

    def elapsed(call: Callable[[], str], repeats: int = 1) -> float:
        timed.append((call(), repeats))
        return timing.TARGET_SECONDS / 3

    monkeypatch.setattr(timing, "elapsed", elapsed)
    monkeypatch.setattr(timing, "settle", lambda call: settled.append(call()))
    calls = {name: lambda name=name: name for name in "abc"}
    timing.interleaved(calls, 1, pools={"a": "one", "b": "one", "c": "two"})
    assert settled == ["a", "c"]
    assert [name for name, repeats in timed if repeats == 3] == ["a", "b", "c"]


def test_settling_calls_for_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    timing.settle(lambda: calls.append(1))  # no time: once
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.02)
    start = time.perf_counter()
    timing.settle(lambda: calls.append(1))
    assert time.perf_counter() - start >= 0.02
    assert len(calls) > 2


def test_long_calls_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "elapsed", lambda call, repeats=1: 1.0)
    calls = {"a": lambda: None, "b": lambda: None}
    shares: list[float] = []
    assert len(timing.interleaved(calls, 15, shares.append, seconds=16.0)["a"]) == 8
    assert sum(shares) == pytest.approx(1.0)
    assert len(timing.interleaved(calls, 15, seconds=1.0)["a"]) == timing.LEAST_ROUNDS
    assert len(timing.interleaved(calls, 2, seconds=1.0)["a"]) == 2
    assert len(timing.interleaved(calls, 15)["a"]) == 15


def test_quantiles() -> None:
    assert timing.quantiles([3.0, 1.0, 2.0]) == timing.Quantiles(median=2.0, p20=1.4, p80=2.6)
    assert timing.quantiles([7.0]) == timing.Quantiles(7.0, 7.0, 7.0)
