"""The objects of the instruction sets, as the compiler left them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


@pytest.mark.full
@pytest.mark.parametrize("isa", SETS)
def test_no_symbol_can_stand_in_for_another_set(isa: str, tmp_path: Path) -> None:
    """A weak function compiled for AVX-512 could be linked in place of the baseline's and crash an older machine."""
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("needs g++ and nm")
    source, target = ROOT / "csrc" / "cpu" / "isa" / f"{isa}.cpp", tmp_path / "kernels.o"
    flags = ["-O1", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", *SETS[isa]]
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
    listing = subprocess.run(["nm", "-C", "--defined-only", str(target)], check=True, capture_output=True, text=True)
    symbols = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
    shared = {name for kind, name in symbols if kind not in "tdbr" and name != "DW.ref.__gxx_personality_v0"}
    assert shared == {f"fastseq::k{isa.capitalize()}Kernels"}
