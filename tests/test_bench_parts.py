"""The benchmark's parts: the cases and goals, the check before timing, the machine's limits, memory, ONNX models."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bench_support import SMALL, row, run_of, spread

from fastseq.cli.bench import forced, goals, memory, peaks, processes, report, results
from fastseq.cli.bench.cases import CASES, COSTED_VARIANTS, SHAPES, Case
from fastseq.cli.bench.layers import FastseqRunner, converted, reference_runner
from fastseq.cli.bench.measure import new_shapes
from fastseq.cli.bench.problem import Mismatch, Problem, sanity_bound, verify
from fastseq.cli.bench.providers import PROVIDERS, by_name

RUNTIMES = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is not None]


def test_keys_name_one_case_each() -> None:
    assert len({case.key for case in CASES}) == len(CASES)


def test_every_shape_is_there() -> None:
    assert len(set(SHAPES)) == 11
    for mode, dtype in (("forward", "float32"), ("training", "float32"), ("forward", "bfloat16")):
        assert {Case("lstm", mode, *shape, dtype=dtype) for shape in SHAPES} <= set(CASES)


def test_arithmetic_by_hand() -> None:
    # Two layers of an LSTM: 4 H (I + H) and 4 H (H + H) multiply-adds for each of T B steps.
    case = Case("lstm", "forward", 3, 5, 7, 11, layers=2)
    assert case.gflop() == pytest.approx(2e-9 * 3 * 5 * (44 * 18 + 44 * 22))
    assert replace(case, mode="training").gflop() == pytest.approx(3 * case.gflop())
    assert case.gflop(steps=5) == pytest.approx(case.gflop() / 3)
    projected = Case("lstm", "forward", 1, 1, 7, 11, proj_size=2)
    assert projected.gflop() == pytest.approx(2e-9 * (44 * 9 + 22))
    assert projected.recurrent_bytes() == 4 * (44 * 2 + 22)
    assert Case("rnn", "forward", 1, 1, 7, 11, dtype="float64").recurrent_bytes() == 8 * 121


def test_goals_find_their_cases() -> None:
    for goal in goals.GOALS:
        assert sum(map(goal.select, CASES)) > 0, goal.what
    counts = {(goal.what, goal.worst): sum(map(goal.select, CASES)) for goal in goals.GOALS}
    assert counts["training vs nn.LSTM", False] == counts["training vs nn.LSTM", True] == 11
    assert counts["forward vs nn.LSTM", True] == 11
    assert counts["forward vs nn.LSTM, T > 1", False] == 10
    assert counts["forward, B = 1, T > 1, vs the best of all peers", True] == 3


def test_outcomes() -> None:
    training = [Case("lstm", "training", *shape) for shape in SHAPES]
    rows = [row(case, 4.0 if index else 1.0) for index, case in enumerate(training)]
    rows += [row(training[0], 3.0, forced_isa="avx2")]
    rows += [row(case, 1.0, first=2.0 + index) for index, case in enumerate(c for c in CASES if c.mode == "first")]
    rows += [row(case, None) for case in CASES if case.mode == "step"]
    found = {(one.goal.what, one.goal.worst): one for one in goals.outcomes(rows)}
    mean, worst = found["training vs nn.LSTM", False], found["training vs nn.LSTM", True]
    assert mean.value == pytest.approx(4.0 ** (10 / 11))
    assert mean.complete
    assert mean.reaches(3.5)
    assert not mean.reaches(3.6)
    assert worst.value == 1.0
    forced_rows = found["AVX2 forced: training vs nn.LSTM", False]
    assert (forced_rows.value, forced_rows.measured, forced_rows.complete) == (pytest.approx(3.0), 1, False)
    first = found["first call of a new shape over a warm one", True]
    assert first.value == 3.0
    assert first.reaches(3.0)
    assert not first.reaches(2.9)
    step = found["streaming step vs torch", False]
    assert (step.value, step.reaches(1.0)) == (None, None)


def test_best_of_the_peers_that_took_part() -> None:
    goal = next(goal for goal in goals.GOALS if len(goal.peers) > 1)
    one = row(next(case for case in CASES if goal.select(case)), 2.0)
    one.ratios["onnxruntime"] = spread(1.5)
    assert goal.figure(one) == 1.5
    found = next(outcome for outcome in goals.outcomes([one]) if outcome.goal is goal)
    assert found.peers == ("torch", "onnxruntime")
    assert not found.complete


def test_a_cost_is_at_most() -> None:
    goal = next(goal for goal in goals.GOALS if goal.cost)
    case = next(case for case in CASES if goal.select(case))
    one = row(case, 2.0)
    one.ratios["plain"] = spread(0.8)
    found = next(outcome for outcome in goals.outcomes([one]) if outcome.goal is goal)
    assert found.value == pytest.approx(1.25)
    assert (found.reaches(1.2), found.reaches(1.3)) == (False, True)
    assert report.goal_cells(found)[3].startswith("at most ")


@pytest.mark.parametrize("variant", COSTED_VARIANTS)
def test_plain_runs_without_the_option(variant: str) -> None:
    case = Case("lstm", "training", 6, 5, 3, 7, variant=variant)
    got = by_name("plain").runner(Problem(case)).training(Problem(case).grad_output)
    plain = Problem(replace(case, variant="plain"))
    expected = by_name("fastseq").runner(plain).training(plain.grad_output)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert by_name("plain").why_not(replace(case, variant="plain")) is not None


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.key)
def test_wrong_numbers_are_found(case: Case) -> None:
    """Each library in turn with one wrong weight, which is enough for the check to refuse it."""
    problem = Problem(case)
    serving = {one.name: one for one in PROVIDERS if one.name not in ("compile", "plain") and one.why_not(case) is None}
    verify(problem, {name: provider.runner(problem) for name, provider in serving.items()}, reference_runner)
    spoiled = Problem(case)
    with torch.no_grad():
        spoiled.layer.weight_ih_l0[0, 0] += 1.0
    for wrong in serving:
        runners = {name: one.runner(spoiled if name == wrong else problem) for name, one in serving.items()}
        with pytest.raises(Mismatch, match=f"{wrong}|all sequences"):
            verify(problem, runners, reference_runner)


def test_sequences_that_are_not_checked_by_the_reference_are_held_against_torch() -> None:
    problem = Problem(Case("lstm", "forward", 5, 9, 4, 6))
    missed = min(set(range(9)) - set(problem.rows()))

    class Wrong(FastseqRunner):
        def output(self, input: torch.Tensor) -> torch.Tensor:
            result = super().output(input).clone()
            result[-1, missed] += 0.1
            return result

    runners = {"torch": by_name("torch").runner(problem), "fastseq": Wrong(problem, converted(problem))}
    with pytest.raises(Mismatch, match="all sequences"):
        verify(problem, runners, reference_runner)


def test_rows_are_few_and_include_both_ends() -> None:
    for batch in (1, 2, 3, 4, 5, 256):
        rows = Problem(Case("lstm", "forward", 1, batch, 2, 2)).rows()
        assert len(rows) == min(batch, 4)
        assert rows[0] == 0
        assert rows[-1] == batch - 1


def test_uneven_lengths_have_the_stated_mean() -> None:
    lengths = Problem(Case("lstm", "training", 100, 2000, 1, 1, variant="lengths")).lengths
    assert lengths is not None
    assert lengths.float().mean().item() == pytest.approx(62, abs=1.5)


def test_new_shapes_are_new() -> None:
    case = Case("lstm", "first", 8, 3, 4, 5)
    shapes = new_shapes(case, 20)
    assert len({T for T, _ in shapes} | {case.T}) == 21


def test_sanity_bound_grows_with_the_epsilon() -> None:
    bounds = [sanity_bound(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.1


@pytest.mark.skipif(not RUNTIMES, reason="neither onnxruntime nor OpenVINO is installed")
@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    "case",
    [
        Case("lstm", "forward", 6, 3, 4, 5, layers=2),
        Case("lstm", "step", 1, 2, 4, 5),
        Case("rnn", "forward", 6, 3, 4, 5, nonlinearity="relu"),
        Case("rnn", "step", 1, 2, 4, 5),
    ],
    ids=lambda case: case.key,
)
def test_onnx_models_have_the_gates_in_order(name: str, case: Case) -> None:
    problem = Problem(case)
    got, expected = (by_name(one).runner(problem) for one in (name, "torch"))
    pairs = zip(got.step(), expected.step(), strict=True) if case.mode == "step" else []
    for one, other in pairs or [(got.forward(problem.input), expected.forward(problem.input))]:
        assert (one - other).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_absent_runtimes_say_how_to_get_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    case = Case("lstm", "forward", 5, 3, 4, 6)
    assert by_name(name).why_not(case) == f"{name} and onnx not installed: pip install 'fastseq[bench]'"


def test_peaks_are_of_the_machine() -> None:
    for dtype, threads in (("float32", 1), ("float64", 1)):
        found = peaks.fma_gflops(dtype, threads)
        assert found is not None
        assert found > 0.5  # the slowest machine there is
    small, large = peaks.read_gbytes(16 << 10, 1), peaks.read_gbytes(64 << 20, 1)
    assert small is not None
    assert large is not None
    assert small > large


def test_loops_count_their_work() -> None:
    from fastseq.cpu.extension import _cpu

    data = torch.zeros(1 << 14)
    assert _cpu.fma_loop(0, 0, 0, 6, 1) == 3 * _cpu.fma_loop(0, 0, 0, 2, 1)
    assert _cpu.fma_loop(0, 0, 0, 2, 1) == 2 * _cpu.fma_loop(1, 0, 0, 2, 1)
    assert _cpu.read_loop(0, data.data_ptr(), data.nbytes, 3, 1) == 3 * data.nbytes
    for arguments in ((2, 0, 0, 1, 1), (0, 0, 64, 1, 1), (0, 0, 0, 0, 1), (0, 0, 0, 1, 0)):
        with pytest.raises(ValueError, match=r"float32 and float64|out of range"):
            _cpu.fma_loop(*arguments)


def test_percent_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "fma_gflops", lambda dtype, threads: {"float32": 100.0, "float64": 50.0}[dtype])
    monkeypatch.setattr(peaks, "read_gbytes", lambda size, threads: 10.0)
    batch = Case("lstm", "training", 10, 8, 16, 16)
    assert peaks.percent(batch, 1.0, 0.1, 2) == (pytest.approx(10.0), "fma")
    assert peaks.percent(replace(batch, dtype="float64"), 1.0, 0.1, 2) == (pytest.approx(20.0), "fma")
    assert peaks.percent(replace(batch, dtype="bfloat16"), 1.0, 0.1, 2) == (pytest.approx(10.0), "fma")
    single = Case("lstm", "forward", 10, 1, 16, 16)
    seconds = 10 * 4 * 4 * 16 * 16 / 1e9 / 5.0  # the weights once a step, at half of the 10 GB/s
    assert peaks.percent(single, 1.0, seconds, 2) == (pytest.approx(50.0), "read")
    assert peaks.percent(replace(single, mode="training"), 1.0, seconds, 2) == (pytest.approx(100.0), "read")


def test_memory_of_a_call() -> None:
    """A forward call must hold its output; training also the tape, of five numbers a unit and step."""
    case = Case("lstm", "forward", 256, 64, 8, 128)
    output = 4 * 256 * 64 * 128 / 2**20
    forward, training = (memory.peak_mib(replace(case, mode=mode), "fastseq", 2) for mode in ("forward", "training"))
    if forward is None or training is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert output * 0.9 < forward < 8 * output
    assert 5 * output < training < 20 * output


def test_results_survive_the_file() -> None:
    run = run_of([row(SMALL[0], 2.0), row(SMALL[8], 1.5, first=2.0), row(SMALL[9], None, forced_isa="avx2")])
    run.scaling.append(results.Point("T", 5, row(SMALL[1], 2.0)))
    assert results.from_json(results.to_json(run)) == run


def test_merged_runs_keep_the_best_limits() -> None:
    def run(fma: float, read: float | None) -> results.Run:
        return run_of([], peaks={"fma_gflops": {"float32": fma}, "read_gbytes": {"16 KiB per thread": read}})

    expected = {"fma_gflops": {"float32": 3.0}, "read_gbytes": {"16 KiB per thread": 5.0}}
    assert results.merged(run(3.0, None), run(2.0, 5.0), CASES).environment["peaks"] == expected
    assert results.merged(run(2.0, 5.0), run(3.0, 4.0), CASES).environment["peaks"] == expected


def test_disturbed_cases_are_named() -> None:
    quiet, noisy = row(SMALL[0], 2.0), row(SMALL[1], 2.0, forced_isa="avx2")
    noisy.figures["torch"] = replace(noisy.figures["torch"], ms=spread(4.0, 0.3))
    assert report.disturbed([quiet, noisy]) == [f"{SMALL[1].key} (avx2 forced)"]


def test_changes_need_the_same_case_and_set() -> None:
    old, new = run_of([row(SMALL[0], 2.0)]), run_of([row(SMALL[0], 1.0, forced_isa="avx2"), row(SMALL[1], 1.0)])
    assert results.changes(old, new) == []


def test_the_process_in_the_middle_is_kept() -> None:
    rows = [row(SMALL[0], ratio) for ratio in (1.0, 3.0, 2.0)]
    rows[0].figures["fastseq"] = replace(rows[0].figures["fastseq"], memory_mib=7.0)
    kept = processes.middle(rows)
    assert (kept.ratios, kept.processes) == (rows[2].ratios, 3)
    assert kept.figures["fastseq"].memory_mib == 7.0


@pytest.mark.full
def test_measured_in_several_processes() -> None:
    case = Case("lstm", "forward", 1, 1, 256, 256)
    (kept,) = processes.repeated([case], 3, rounds=1, memory=False, options=["--compile"])
    assert (kept.case, kept.processes) == (case, 3)
    assert "compile" in kept.figures


@pytest.mark.full
def test_held_to_avx2() -> None:
    case = Case("lstm", "training", 1, 1, 256, 256)
    assert forced.applies(case)
    done = forced.run([case], rounds=1, memory=False)
    assert [(one.case, one.isa, one.forced_isa) for one in done.rows] == [(case, "avx2", "avx2")]


@pytest.mark.full
def test_compiled_reference() -> None:
    case = Case("lstm", "training", 3, 2, 4, 5, layers=2)
    problem = Problem(case)
    runners = {name: by_name(name).runner(problem) for name in ("torch", "compile")}
    verify(problem, runners, reference_runner)
    assert by_name("compile").why_not(replace(case, T=1000)) is not None


@pytest.mark.full
def test_pytest_benchmarks_share_the_cases() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "--benchmark-disable"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for case in CASES:
        assert f"[{case.key}]" in listing
