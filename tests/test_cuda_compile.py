"""The CUDA kernels compile for GPUs that are not there, warnings being errors, and spill nothing. Needs nvcc."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import cuda_build
import pytest

from benchmarks import cuda_resources

NVCC = cuda_build.nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
JOBS = [(source, target) for source, targets in cuda_build.CUDA_SOURCES.items() for target in targets]
# Of the quick tier one source for each target.
QUICK = {("lstm_cluster_forward_bfloat16.cu", "sm_90a"), ("cells_launch.cu", "sm_80"), ("facts.cu", "sm_100a")}


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(source, target, marks=() if (source.name, target) in QUICK else pytest.mark.full)
        for source, target in JOBS
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_it_compiles_and_spills_nothing(source: Path, target: str) -> None:
    assert NVCC is not None
    for kernel in cuda_resources.compile_source(NVCC, source, target):
        assert kernel.spilled == 0, kernel


@needs_nvcc
@pytest.mark.full
def test_the_extension_builds_and_imports_without_a_gpu(tmp_path: Path) -> None:
    """It is linked with the static runtime, so that a machine with neither CUDA nor a GPU can import it."""
    assert NVCC is not None
    module = tmp_path / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    cuda_build.build_extension(NVCC, tmp_path / "objects", module, werror=True)
    code = (
        "import _cuda\n"
        "assert _cuda.cluster_builds(512, False) and not _cuda.emulated\n"
        "try: print(_cuda.device_facts(0))\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cudaDeviceGetAttribute: " in done.stdout or done.stdout.startswith("[")
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    assert "libcuda.so" not in needed


def test_the_committed_table_has_every_kernel() -> None:
    """Its figures are those of the machine that made it; its rows are those of the sources."""
    text = " ".join(cuda_resources.TABLE.read_text(encoding="utf-8").split())
    assert "no kernel here has run on a GPU" in text
    assert " 0 of them spill" in text
    for dtype in ("bfloat16", "float16"):
        for name in ("lstm_cluster_forward", "lstm_cluster_backward"):
            assert text.count(f"| {name} | {dtype} |") == 12
        for name in ("lstm_grid_forward", "lstm_grid_backward"):
            assert text.count(f"| {name} | {dtype} |") == 4
