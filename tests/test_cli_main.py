"""``python -m fastseq``: parsing, help, and errors as one line with a non-zero status."""

import os
import subprocess
import sys

import pytest

from fastseq._version import __version__
from fastseq.cli import console
from fastseq.cli.main import main

COMMANDS = ("info", "check", "demo", "dec", "bench")


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "fastseq", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in (*COMMANDS, "lm"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastseq {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["check", "--op", "gru"],
        ["demo", "--steps", "0"],
        ["demo", "--hidden", "many"],
        ["demo", "--seconds", "nan"],
        ["demo", "--seconds", "inf"],
        ["bench", "--rounds", "-1"],
    ],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_unwritable_json(command, tmp_path, capsys):
    target = tmp_path / "missing" / "out.json"
    assert main([command, "--json", str(target)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"fastseq {command}: cannot write {target}: No such file or directory\n"


def test_json_that_is_a_folder(tmp_path, capsys):
    assert main(["info", "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fastseq info: cannot write {tmp_path}: it is a folder\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_json_without_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["info", "--json", str(tmp_path / "out.json")]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_check_writable_keeps_what_is_there(tmp_path):
    target = tmp_path / "kept"
    target.write_text("kept")
    console.check_writable(target)
    assert target.read_text() == "kept"
    console.check_writable(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("command", "package"), [("check", "rich"), ("demo", "rich"), ("demo", "matplotlib"), ("bench", "rich")]
)
def test_missing_extra_is_named(command, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import raise ModuleNotFoundError
    out = ["--out", str(tmp_path / "demo.png")] if command == "demo" else []
    assert main([command, *out]) == 2
    error = capsys.readouterr().err
    assert f"'{package}'" in error
    assert "pip install 'fastseq[cli]'" in error


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        console.require("broken_package", "the test")


def test_closed_pipe_is_silent():
    done = subprocess.run(
        f"'{sys.executable}' -m fastseq info | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_source_folder_is_not_needed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastseq", "info"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
