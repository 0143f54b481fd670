"""The README says what the code and the committed figures say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` is a folder of the checkout, not part of the package

from bench_support import row, run_of  # noqa: E402

from benchmarks import clustering_table, option_costs, table  # noqa: E402
from fastseq.cli.bench.cases import Case  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "swap_lstm.py"


def test_figures_are_those_of_the_results_file():
    stored = table.load(), clustering_table.load(), option_costs.load()
    assert table.updated(README, *stored) == README, "run: python -m benchmarks.table"


def test_figures_are_rendered_row_by_row():
    case = Case("lstm", "training", 128, 32, 256, 256, variant="lengths")
    text = table.render(run_of([row(case, 4.0), row(Case("lstm", "step", 1, 1, 256, 256), None)]))
    cells = "lstm, uneven lengths | 128, 32, 256, 256, 1 | training | 8 | 2 | 4.00 (3.60–4.40) | 10 | 25 | 1 / 3"
    assert f"| {cells} |" in text
    assert "commit `cccccccccccc`" in text
    assert "| training with uneven lengths vs torch's packing | geometric mean | 4.00× | 3.5× | 6× | must |" in text
    assert "| streaming step vs torch | geometric mean | – (0 of 1 cases) | 8× | 15× | not measured |" in text
    assert "100 GF/s float32, 50 GB/s reading 16 KiB per thread." in text
    assert "Left out: fastseq: not there (1 cases)." in text


def test_clustering_figures_are_rendered_row_by_row():
    spread = {"median": 2.0, "p20": 1.5, "p80": 4.5}
    figures = {
        name: {"ms": spread, "ratio": spread, "extra_mib": extra}
        for name, extra in (("fastseq", 3.21), ("cdist", None))
    }
    environment = {"cpu": "X", "cores": 2, "threads": 2, "instruction_set": "avx2", "date": "d", "commit": "c" * 40}
    case = {"case": "(70000, 10, 10)", "rounds": 5, "best": "cdist", "figures": figures}
    text = clustering_table.render({"environment": environment, "cases": [case]})
    assert "| 70000, 10, 10 | fastseq | 2 (1.5–4.5) | 2.00 (1.50–4.50) | 4× | 9× | no | 3.2 |" in text
    assert "| 70000, 10, 10 | cdist (best of torch) | 2 (1.5–4.5) |" in text
    assert "commit `cccccccccccc`. 5 interleaved rounds" in text


def test_option_costs_are_rendered_row_by_row():
    case = next(case for case in option_costs.MEASURED if case.variant == "peephole")
    one = row(case, 4.0)
    one.figures["plain"] = one.figures["torch"]
    one.ratios["plain"] = one.ratios["torch"]
    text = option_costs.render(run_of([one]))
    assert "| lstm, peephole | 128, 32, 256, 256, 1 | 8 | 2 | 0.25 (0.23–0.28) | 1.1× | yes | 8 | 4.00× |" in text


def test_markers_are_required():
    with pytest.raises(ValueError, match="markers"):
        table.updated("no markers here", None, None, None)


def test_example_is_the_file_that_runs():
    code = re.search(r"<!-- example: examples/swap_lstm.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert EXAMPLE.read_text(encoding="utf-8").endswith(code[1])
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    kind, _, difference = done.stdout.strip().rpartition(" ")
    assert kind.startswith("<class 'fastseq.")
    assert float(difference) <= 1e-6


def test_commands_of_the_readme_exist():
    from fastseq.cli.main import build_parser

    parser = build_parser()
    commands = set(re.findall(r"python -m fastseq (\w+)", README))
    assert commands >= {"info", "check", "bench"}
    needed = {"lm": ["generate", "model", "--prompt", "x"]}
    for command in commands:
        assert parser.parse_args([command, *needed.get(command, [])]).command == command
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z0-9-]+)", README)) <= targets


def test_results_are_from_a_clean_commit():
    results, clustering, options = table.load(), clustering_table.load(), option_costs.load()
    if results is None or clustering is None or options is None:
        pytest.skip("no figures are committed")
    for environment in (results.environment, clustering["environment"], options.environment):
        assert re.fullmatch(r"[0-9a-f]{40}", environment["commit"]), "figures come from an uncommitted tree"
    assert results.rows
    assert len(clustering["cases"]) == len(clustering_table.CASES)
    assert {row.case for row in options.rows} == set(option_costs.MEASURED)
