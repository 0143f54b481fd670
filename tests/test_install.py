"""The package as it is installed: the compiled extension is there, and the sdist holds what a build elsewhere needs."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastseq

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "fastseq",
    "fastseq.autoencoder",
    "fastseq.cli",
    "fastseq.cli.bench",
    "fastseq.cluster",
    "fastseq.cpu",
    "fastseq.cuda",
    "fastseq.datasets",
    "fastseq.kernels",
    "fastseq.models",
    "fastseq.nn",
    "fastseq.ops",
    "fastseq.reference",
)


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The archive, built by the environment's own setuptools."""
    folder = tmp_path_factory.mktemp("sdist")
    # From a copy without what earlier builds have left: setuptools would add the files that an old egg-info lists.
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=leftovers)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "source")
    (archive,) = folder.glob("fastseq-*.tar.gz")
    return archive


def test_extension_is_present():
    """Fails, and does not skip: without the extension the other tests would test the reference against itself."""
    facts = fastseq.info()
    assert facts["cpu"]["kernels"], facts["cpu"]["why_unavailable"]
    assert all(devices["cpu"]["backend"] == "cpp" for devices in facts["ops"].values())


def test_kernels_are_one_folder():
    assert (ROOT / "fastseq" / "kernels").is_symlink()
    assert (ROOT / "fastseq" / "kernels").resolve() == ROOT / "kernels"


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for pattern in ("fastseq/__init__.py", "fastseq/*/__init__.py", "fastseq/*/*/__init__.py")
        for path in ROOT.glob(pattern)
    }
    assert found == set(PACKAGES)


def test_import_compiles_nothing_and_needs_no_extra():
    code = (
        "import sys, fastseq; bad = {'rich', 'matplotlib', 'pytest', 'triton', 'sklearn', 'scipy', "
        "'safetensors', 'skimage', 'torch.utils.cpp_extension', "
        "'torch._inductor', 'torch._dynamo', 'fastseq.cli'} & set(sys.modules); sys.exit(repr(bad) if bad else 0)"
    )
    run(sys.executable, "-c", code)


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert not any(member.issym() for member in archive)
    wanted = {
        str(path.relative_to(ROOT))
        for pattern in ("csrc/**/*", "fastseq/**/*.py", "fastseq/kernels/*.py", "fastseq/py.typed")
        for path in ROOT.glob(pattern)
        if path.is_file()
    }
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


@pytest.mark.full
def test_sdist_installs_elsewhere(sdist, tmp_path):
    """Compiles in an empty place and runs from there, away from the checkout."""
    place = tmp_path / "place"
    wheels = tmp_path / "wheels"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", wheels, sdist)
    run(*pip, *build, cwd=tmp_path)
    (wheel,) = wheels.glob("fastseq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastseq"}
    assert {"/".join([*package.split("."), "__init__.py"]) for package in PACKAGES} | {"fastseq/py.typed"} <= names
    assert [name for name in names if name.startswith("fastseq/_cpu.") and name.endswith(".so")]
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]

    run(*pip, "install", "--no-deps", "--no-index", "--target", place, wheel, cwd=tmp_path)
    environment = os.environ | {"PYTHONPATH": str(place)}
    target = tmp_path / "info.json"
    where = run(sys.executable, "-c", "import fastseq; print(fastseq.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(place)
    run(sys.executable, "-m", "fastseq", "info", "--json", target, cwd=tmp_path, env=environment)
    facts = json.loads(target.read_text())
    assert facts["cpu"]["kernels"], facts["cpu"]["why_unavailable"]
    assert facts["ops"]["lstm"]["cpu"]["backend"] == "cpp"
    check = ("check", "--op", "lstm", "--dtype", "float32")
    run(sys.executable, "-m", "fastseq", *check, cwd=tmp_path, env=environment)
