"""``python -m fastseq check``: what it covers, and that it finds an error."""

import json

import pytest

from fastseq import cpu, testing
from fastseq.cli import check
from fastseq.cli.main import main
from fastseq.ops import dispatch


def test_small_subset_passes(tmp_path, capsys):
    target = tmp_path / "check.json"
    assert main(["check", "--op", "rnn", "--dtype", "float64", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert " 0 mismatches" in printed
    data = json.loads(target.read_text())
    assert data["ok"]
    assert {outcome["target"]["isa"] for outcome in data["outcomes"]} >= set(cpu.isas())


def test_everything_is_covered():
    targets = list(check.targets(list(check.OPERATIONS), list(check.DTYPES)))
    for op in check.OPERATIONS:
        found = {(target.implementation, target.isa) for target in targets if target.op == op}
        assert found == {("reference", None), *(("cpp", isa) for isa in cpu.isas())}
    assert {target.dtype for target in targets} == set(check.DTYPES)


@pytest.mark.parametrize("op", check.OPERATIONS)
def test_cases_have_names_of_their_own(op):
    names = [name for name, _ in check.cases(op)] + [name for name, _, _ in check.option_cases(op)]
    assert len(names) == len(set(names))


def test_every_option_has_a_case():
    for op, options in dispatch.OPTIONS.items():
        assert {option for _, used, _ in check.option_cases(op) for option in used} == set(options)


@pytest.mark.parametrize("wrong", [float("nan"), 1.0])
def test_a_mismatch_is_found(wrong, monkeypatch, capsys):
    def compare(op, inputs, **options):
        return [testing.Comparison("y", wrong, 0.5, False), testing.Comparison("h_n", 0.0, 0.5, True)]

    monkeypatch.setattr(testing, "compare", compare)
    assert main(["check", "--op", "rnn", "--dtype", "float32"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "rnn, cpp" in printed


def test_an_exception_is_a_mismatch(monkeypatch, capsys):
    def compare(op, inputs, **options):
        raise RuntimeError("the kernel fell over")

    monkeypatch.setattr(testing, "compare", compare)
    assert main(["check", "--op", "lstm", "--dtype", "float32"]) == 1
    assert "the kernel fell over" in capsys.readouterr().out


@pytest.mark.full
def test_everything_passes():
    assert main(["check"]) == 0
