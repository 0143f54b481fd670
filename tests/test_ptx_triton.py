"""The Triton kernels as Triton compiles them for a GPU, run in numpy (``ptx/``), against the float64 reference.

Unlike in the interpreter there is bfloat16, the programs of a launch run side by side, and what orders their accesses
is checked.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from clustering_cases import Case as Points
from clustering_cases import inputs_of as points_of
from ptx import Fault, Traffic
from recurrence_cases import Case, draws_for, inputs_of, with_options

pytest.importorskip("triton", reason="triton is not installed (it is optional)")

from ptx.launches import Replaced, compiled_launches

from fastseq.kernels import lstm, plan, rnn
from fastseq.testing import assert_matches_reference

OPS = {"lstm": 4, "rnn": 1}
TARGETS = ["sm_80", "sm_90", "sm_100"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TILE: dict[str, Any] = {"BB": 16, "BH": 16}
# Of the persistent ones several programs share the units, and two groups or one the batch.
REGIMES: dict[str, dict[str, Any]] = {
    "resident": {"regime": "resident"},
    "persistent": {"regime": "persistent", "groups": 2, **TILE},
    "persistent-streamed-flags": {"regime": "persistent", "groups": 1, "held": 0, "sync": "flags", **TILE},
    "persistent-held-in-part": {"regime": "persistent", "groups": 1, "warps": 1, "KC": 16, "held": 1, **TILE},
    "persistent-in-registers": {"regime": "persistent", "groups": 1, "warps": 2, "KC": 16, "held": 99, **TILE}
    | {"registers": 2},
    "step": {"regime": "step", **TILE},
    "step-held": {"regime": "step", "BB": 32, "BH": 32, "held": 99, "KC": 16, "depth": 1},
}
# Edges of every tile, two or three of them along the units and the batch.
CASE = Case(3, 33, 3, 38, time="lengths+reset")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_in_bfloat16(regime: str, op: str, seed: int) -> None:
    """Of the quick tier each regime with all options by masks or by rates, in one direction."""
    turn = list(REGIMES).index(regime) + list(OPS).index(op)
    case = dataclasses.replace(CASE, reverse=turn % 2 == 1)
    given = with_options(case, op, torch.bfloat16, by_rate=turn % 4 > 1)[:1]
    with plan.override(**REGIMES[regime]), compiled_launches("sm_90", seed) as ran:
        assert_matches_reference(op, given, implementation="triton", seed=seed)
    assert len(ran) == 2 * (CASE.T if regime.startswith("step") else 1)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_regime(target: str, regime: str, op: str, dtype: torch.dtype, seed: int) -> None:
    """With all options and without any, with flags and none, in either direction; units of three tiles of weights."""
    case = dataclasses.replace(CASE, H=70, reverse=op == "rnn")
    plain = Case(3, 17, 4, 45, reverse=op == "lstm", bias="ih")
    for given in (
        with_options(case, op, dtype, by_rate=regime.startswith("step")),
        draws_for(op, plain, dtype, nonlinearity="relu" if dtype == torch.float16 else "sigmoid"),
    ):
        with plan.override(**REGIMES[regime]), compiled_launches(target, seed):
            assert_matches_reference(op, given[:2], implementation="triton", seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [Case(3, 16, 8, 256), Case(2, 5, 4, 650, time="reset")], ids=str)
def test_plans_of_an_h100(case: Case, op: str, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be launched there: as many programs as it can hold, and the tiles that go with it."""
    for module in (lstm, rnn):
        monkeypatch.setattr(module, "chip_of", lambda _: plan.H100)
    with compiled_launches("sm_90", seed):
        assert_matches_reference(op, inputs_of(case, OPS[op], dtype), implementation="triton", seed=seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("capability", [8, 9, 10])
def test_random_shapes_on_random_chips(capability: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of few multiprocessors with little or much memory, so that small layers are planned as large ones are."""
    draw = random.Random(seed)
    for _ in range(16):
        op, dtype = draw.choice(list(OPS)), draw.choice(DTYPES)
        chip = plan.Chip(draw.choice([1, 2, 3, 5, 8, 16]), draw.choice([16, 24, 40, 64, 227]) * 1024, capability)
        time = draw.choice(["", "lengths", "reset", "lengths+reset"])
        H = draw.choice([draw.randint(1, 40), draw.randint(30, 140), draw.randint(100, 200)])
        sizes = draw.randint(1, 4), draw.randint(1, 40), draw.randint(1, 20), H
        case = Case(*sizes, reverse=draw.random() < 0.5, time=time)
        fields: dict[str, Any] = {"sync": draw.choice(plan.SYNCS)}
        fields |= {"precision": draw.choice(["ieee", "tf32x3"])} if dtype == torch.float32 else {}
        for module in (lstm, rnn):
            monkeypatch.setattr(module, "chip_of", lambda _, chip=chip: chip)
        given = with_options(case, op, dtype, True) if draw.random() < 0.5 else draws_for(op, case, dtype)
        try:
            with plan.override(**fields), compiled_launches(f"sm_{10 * capability}", seed):
                few = given[: 1 if case.B * H > 200 else None]
                assert_matches_reference(op, few, implementation="triton", seed=seed)
        except (AssertionError, Fault) as error:
            raise AssertionError(f"{op} {case} {dtype} {chip} {fields}: {error}") from None


@pytest.mark.parametrize("op", OPS)
def test_no_bank_conflicts_in_the_resident_regime(op: str, seed: int) -> None:
    """No warp reads or writes shared memory in more turns than its words fill the banks."""
    traffic = Traffic()
    with plan.override(regime="resident"), compiled_launches("sm_90", seed, traffic=traffic):
        given = inputs_of(Case(2, 16, 3, 128), OPS[op], torch.bfloat16)
        assert_matches_reference(op, given, implementation="triton", seed=seed)
    assert traffic.total().fewest > 1000
    assert not traffic.conflicts()


CLUSTERING = (
    "clustering_loss",
    "clustering_loss(freq)",
    "student_t_assignment",
    "target_distribution",
    "nearest_center",
)
# Sizes that fill no tile, and several tiles of each dimension; far from the origin, tight, of rows apart.
POINTS = [
    (Points(70, 12, 66, alpha=0.5), torch.float16),
    (Points(70, 20, 35, kind="far"), torch.float32),
    (Points(70, 66, 14, alpha=2, kind="tight", strided=True), torch.float32),
    (Points(70, 20, 35), torch.bfloat16),
    (Points(130, 34, 65, alpha=5), torch.bfloat16),
]


def check_points(op: str, case: Points, dtype: torch.dtype, target: str, seed: int) -> None:
    name = op.partition("(")[0]
    # A loss is one number, which the reference may have right by luck.
    draws = [points_of(case, dtype, op) for _ in range(16 if name == "clustering_loss" else 4)]
    with compiled_launches(target, seed):
        assert_matches_reference(name, draws, implementation="triton", seed=seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", CLUSTERING)
def test_points_and_centres_in_bfloat16(op: str, seed: int) -> None:
    check_points(op, *POINTS[3], "sm_90", seed)


@pytest.mark.full
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("case", "dtype"), POINTS, ids=str)
@pytest.mark.parametrize("op", CLUSTERING)
def test_points_and_centres(op: str, case: Points, dtype: torch.dtype, target: str, seed: int) -> None:
    check_points(op, case, dtype, target, seed)


# A store beyond a tensor is in another one, or is somebody else's place in the same.
OUTSIDE = "offsets .* of|in no tensor|by two warps at once|while another warp"
# Regime; what is taken out of the compiled kernels (a pattern), and what takes its place; what is found.
FAULTS: dict[str, tuple[str, str, str, str]] = {
    "a counter that tells of no stores": ("persistent", r"\.release\.", ".relaxed.", "exchange: read at"),
    "a counter that shows no stores": ("persistent", r"\.acquire\.", ".relaxed.", "exchange: read at"),
    "flags that tell of no stores": ("persistent-streamed-flags", r"\.release\.", ".relaxed.", "exchange: read at"),
    "flags that show no stores": ("persistent-streamed-flags", r"fence\.acq_rel\.gpu;", "", "exchange: read at"),
    "threads that do not meet": ("persistent", r"bar\.sync[^;]*;", "", "shared memory of block .*: read at"),
    "copies that nobody waits for": ("persistent-streamed-flags", r"cp\.async\.wait_group[^;]*;", "", "under way"),
    "weights of another place": ("step", r"ldmatrix(\S*)\.trans", r"ldmatrix\1", "does not match"),
    "stores beyond the last unit": ("step", r"@%p\d+ (st\.global)", r"\1", OUTSIDE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, seed: int) -> None:
    regime, pattern, instead, found = FAULTS[fault]
    spoil = Replaced(pattern, instead)
    given = inputs_of(dataclasses.replace(CASE, time=""), 4, torch.bfloat16)
    with (
        plan.override(**REGIMES[regime]),
        compiled_launches("sm_90", seed, spoil),
        pytest.raises((Fault, AssertionError), match=found),
    ):
        assert_matches_reference("lstm", given, implementation="triton", seed=seed)
    assert spoil.count


def test_programs_that_are_not_all_there(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched without the promise that all run at once, they may wait for ever."""
    monkeypatch.setattr(plan.Plan, "cooperative", False)
    given = inputs_of(CASE, 4, torch.bfloat16)
    with (
        plan.override(**REGIMES["persistent"]),
        compiled_launches("sm_90", seed),
        pytest.raises(Fault, match="no thread can go on"),
    ):
        assert_matches_reference("lstm", given, implementation="triton", seed=seed)
