"""``fastseq.info()`` and ``python -m fastseq info``."""

import json
import os
import subprocess
import sys

import torch

import fastseq
from fastseq.cli.main import main
from fastseq.kernels import plan
from fastseq.ops import dispatch


def run(*arguments: str, **switches: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastseq", "info", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **switches},
    )


def test_facts():
    facts = fastseq.info()
    assert facts["fastseq"] == fastseq.__version__
    assert facts["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["isa"] in facts["cpu"]["isas"]
    assert facts["cpu"]["why_unavailable"] is None
    assert facts["ops"].keys() == set(dispatch.OPS)
    for devices in facts["ops"].values():
        assert devices["cpu"]["backend"] == "cpp"
        assert facts["cpu"]["isa"] in devices["cpu"]["why"]
        assert devices["cuda"]["backend"] == "reference"


def test_regimes_of_the_triton_kernels_are_told():
    """As the plans choose them, on an H100 where there is no GPU."""
    told = fastseq.info()["triton_regimes"]
    assert told.keys() == {"lstm", "rnn"}
    if not torch.cuda.is_available():
        names = {
            "resident": ("resident", "held"),
            "persistent": ("persistent", "held"),
            "persistent with weights held in part": ("persistent", "held in part"),
        }
        for which in ("forward", "backward"):
            text = told["lstm"][f"{which}, 16 bit"]
            pieces = [piece.split(" to ") for piece in text.split(", ")[:3]]
            assert text == ", ".join([*(f"{name} to {end}" for name, end in pieces), "step beyond"])
            assert [name for name, _ in pieces] == list(names)
            expected = [names[name] for name, _ in pieces] + [("step", "streamed")]
            for (_, end), below, above in zip(pieces, expected, expected[1:], strict=False):
                for H, (regime, kept) in ((int(end), below), (int(end) + 1, above)):
                    made = plan.choose(plan.Shape(4, which == "backward", 100, 16, H, 2), plan.H100)
                    assert (made.regime, made.cut.kept) == (regime, kept), (which, H)
        assert ", persistent with streamed weights to " in told["lstm"]["forward, 32 bit"]


def test_one_openmp_runtime(tmp_path):
    # In a process of its own: packages that other tests import may bring a second runtime.
    done = run("--json", str(tmp_path / "info.json"))
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "info.json").read_text())["cpu"]["openmp"]) == 1


def test_json_is_what_info_returns(tmp_path, capsys):
    target = tmp_path / "info.json"
    assert main(["info", "--json", str(target)]) == 0
    assert json.loads(target.read_text()) == fastseq.info()
    printed = capsys.readouterr().out
    assert fastseq.info()["cpu"]["model"] in printed


def test_forced_implementation_is_told():
    done = run(FASTSEQ_IMPL="reference")
    assert done.returncode == 0, done.stderr
    assert "forced" in done.stdout


def test_forced_implementation_that_cannot_serve_is_told():
    done = run(FASTSEQ_IMPL="triton")
    assert done.returncode == 0, done.stderr
    assert "cannot serve" in done.stdout


def test_forced_instruction_set_is_told():
    worst = fastseq.info()["cpu"]["isas"][-1]
    done = run(FASTSEQ_CPU_ISA=worst)
    assert done.returncode == 0, done.stderr
    assert f"C++ kernels, {worst}" in done.stdout
