"""The CUDA kernels as nvcc compiles them for Hopper, run in numpy (``ptx/``), against the float64 reference.

The emulator replaces what only a GPU does by functions in C++. Here nvcc's own instructions run: tensor core
products, ``ldmatrix``, clusters, copies into shared memory and their barriers, releases and acquires; and what orders
the accesses of warps and blocks is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_build
import pytest
import torch
from cuda_support import COMPILER, emulated, emulator, needs_launchers
from ptx import Fault, Traffic
from recurrence_cases import Case, draws_for, inputs_of

from fastseq.cuda import plan
from fastseq.testing import assert_matches_reference

pytestmark = [
    needs_launchers,
    pytest.mark.skipif(COMPILER is None or cuda_build.nvcc() is None, reason="needs g++ and nvcc"),
]

OPS = {"lstm": 4, "rnn": 1}
HALVES = [torch.bfloat16, torch.float16]
BUILDS = range(6)
# Of the quick tier the builds that have the smaller cluster, with one tile of the batch and two.
QUICK_BUILDS = [2, 5]


def check(
    op: str,
    given: Any,
    target: str,
    seed: int,
    spoil: Callable[[str], str] | None = None,
    traffic: Traffic | None = None,
    **fields: Any,
) -> int:
    """How many launches it were."""
    from ptx.cuda_launches import compiled_kernels

    module = emulator()
    with emulated(0, module), plan.override(**fields), compiled_kernels(module, target, seed, spoil, traffic) as ran:
        assert_matches_reference(op, given, implementation="cuda", seed=seed)
    return len(ran)


def given_of(case: Case, dtype: torch.dtype) -> Any:
    """Several draws of what has few numbers, which the reference may all have right by luck."""
    return draws_for("lstm", case, dtype)[:32] if case.B * case.H < 100 else inputs_of(case, 4, dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("build", QUICK_BUILDS)
def test_the_cluster(build: int, seed: int) -> None:
    """Either type, with flags and without, more steps than the ring of the tape has, edges in every dimension."""
    for dtype, time in zip(HALVES, ("lengths+reset", ""), strict=True):
        case = Case(6, 11, 3, 40, time=time, reverse=build == QUICK_BUILDS[0])
        assert check("lstm", inputs_of(case, 4, dtype), "sm_90a", seed, regime="cluster", build=build) == 2


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("groups", [1, 2])
def test_the_grid(groups: int, seed: int) -> None:
    for dtype, time in zip(HALVES, ("lengths+reset", ""), strict=True):
        case = Case(4, 19, 3, 41, time=time, reverse=groups == 2)
        assert check("lstm", inputs_of(case, 4, dtype), "sm_90a", seed, regime="grid", build=groups) == 2


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_cells(op: str, dtype: torch.dtype, seed: int) -> None:
    """Rows that are 16 bytes apart and rows that are not."""
    for case, nonlinearity in (Case(3, 5, 3, 40, time="lengths+reset"), "relu"), (Case(2, 5, 4, 45), "sigmoid"):
        check(op, draws_for(op, case, dtype, nonlinearity)[:2], "sm_90a", seed, regime="cell")


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("target", cuda_build.CLUSTER_TARGETS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("build", BUILDS)
def test_every_build_of_the_cluster(build: int, dtype: torch.dtype, target: str, seed: int) -> None:
    """Several tiles of the batch for a cluster, and weights that do not fit into registers alone."""
    for case in (
        Case(7, 35, 3, 40, time="lengths+reset"),
        Case(6, 5, 4, 45, reverse=True),
        Case(9, 9, 4, 72, reverse=True, time="lengths+reset", bias="ih"),
        Case(1, 1, 1, 1),
        Case(2, 3, 2, 256),
    ):
        check("lstm", given_of(case, dtype), target, seed, regime="cluster", build=build)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("target", cuda_build.TARGETS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_corners_of_the_grid(groups: int, dtype: torch.dtype, target: str, seed: int) -> None:
    for case in (
        Case(7, 35, 3, 40, time="lengths+reset"),
        Case(9, 9, 4, 72, reverse=True, time="lengths+reset", bias="ih"),
        Case(1, 1, 1, 1),
    ):
        check("lstm", given_of(case, dtype), target, seed, regime="grid", build=groups)


@pytest.mark.full
@pytest.mark.parametrize("target", ["sm_80", "sm_100a"])
@pytest.mark.parametrize("op", OPS)
def test_cells_of_other_targets(op: str, target: str, seed: int) -> None:
    for dtype in (torch.float32, *HALVES):
        check(op, draws_for(op, Case(4, 17, 3, 40, time="lengths+reset"), dtype), target, seed, regime="cell")


BUSY = [{"regime": "cluster", "build": build} for build in BUILDS] + [{"regime": "grid", "build": n} for n in (1, 2)]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, marks=() if fields["build"] in QUICK_BUILDS else pytest.mark.full, id=str(fields))
        for fields in BUSY
    ],
)
def test_no_bank_conflicts(fields: dict[str, Any], seed: int) -> None:
    """No warp reads or writes shared memory in more turns than its words fill the banks."""
    traffic = Traffic()
    check("lstm", inputs_of(Case(3, 11, 3, 256), 4, torch.bfloat16), "sm_90a", seed, traffic=traffic, **fields)
    assert traffic.total().fewest > 1000
    assert not traffic.conflicts()


CLUSTER, GRID = {"regime": "cluster", "build": 2}, {"regime": "grid", "build": 1}
SHARED = "shared memory of block .*: "
# Regime; what is taken out of the compiled kernels (a pattern), and what takes its place; what is found.
FAULTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "threads that do not meet": (CLUSTER, r"bar\.sync\s+0;", "", SHARED),
    "pairs of warps that do not meet": (CLUSTER, r"bar\.sync\s+%r\d+, 64;", "", SHARED),
    "blocks that do not meet": (CLUSTER, r"barrier\.cluster\.\w+\.\w+\.aligned;", "", SHARED),
    "a tape that nobody waits for": (CLUSTER, r"@!done bra again;", "", SHARED + "|under way|does not match"),
    "copies that nobody was told of": (CLUSTER, r"mbarrier\.arrive\.expect_tx[^;]*;", "", "no thread can go on"),
    "signals that tell of no stores": (GRID, r"st\.release\.", "st.relaxed.", "read at"),
    "signals that show no stores": (GRID, r"ld\.acquire\.", "ld.relaxed.", "read at"),
    "signals that nobody waits for": (
        GRID,
        r"ld\.acquire\.gpu\.global\.u32 (%r\d+),[^;]*;",
        r"mov.u32 \1, -1;",
        "while another warp",
    ),
    "halves of a fragment that are exchanged": (
        CLUSTER,
        r"(mma.*\}, )\{(%r\d+), (%r\d+)\}(, \{%f)",
        r"\1{\3, \2}\4",
        "does not match",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, seed: int) -> None:
    fields, pattern, instead, found = FAULTS[fault]
    from ptx.launches import Replaced

    spoil = Replaced(pattern, instead)
    with pytest.raises((Fault, AssertionError), match=found):
        check("lstm", inputs_of(Case(6, 11, 3, 40), 4, torch.bfloat16), "sm_90a", seed, spoil, **fields)
    assert spoil.count
