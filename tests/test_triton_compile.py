"""Every Triton kernel compiles for GPUs that are not there, spills nothing and fits into their shared memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (it is optional)")

from benchmarks import triton_resources  # noqa: E402
from benchmarks.triton_resources import CHIPS, CLUSTERING, ClusteringConfiguration, Configuration  # noqa: E402
from fastseq.kernels import plan  # noqa: E402
from fastseq.kernels.ahead import TARGETS, compile_ahead, compiled_ahead  # noqa: E402

ALL = triton_resources.configurations()
# Each kernel in half type with every option, weights held in part, and products without tensor cores: where registers
# are scarcest.
QUICK = [
    Configuration(op, backward, T, B, H, "bfloat16", options="all")
    for op in ("lstm", "rnn")
    for backward in (False, True)
    for T, B, H in ((1024, 16, 768), (100, 32, 128))
]
QUICK += [Configuration("lstm", backward, 64, 16, 1900, "float16") for backward in (False, True)]
QUICK += [Configuration("lstm", False, *sizes, "float32") for sizes in ((512, 64, 512), (35, 20, 650))]


CLUSTERING_ALL = triton_resources.clustering_configurations()


def check(case: Configuration | ClusteringConfiguration, target: str) -> None:
    resources = compile_ahead(case.launch(CHIPS[target])[1], target)
    assert resources.spilled == 0, f"{case.name} for {target} spills: {resources}"
    assert resources.shared <= TARGETS[target][1], f"{case.name} does not fit {target}: {resources}"
    # gfx942 has no matrix instruction for the eight columns that the plan gives a program of some kernels.
    if isinstance(case, Configuration) and case.dtype != "float32" and target != "gfx942":
        assert resources.tensor_cores > 0, f"{case.name} for {target} uses no tensor cores: {resources}"


@pytest.mark.parametrize("target", ["sm_90"])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_each_kernel_compiles(case: Configuration, target: str) -> None:
    check(case, target)


@pytest.mark.parametrize("kernel", CLUSTERING)
def test_each_clustering_kernel_compiles(kernel: str) -> None:
    check(ClusteringConfiguration(kernel, 64, 1000, "bfloat16", alpha=2.0), "sm_90")


@pytest.mark.parametrize("kernel", ["distances", "points' gradient", "centres' gradient", "nearest centre"])
def test_sums_stay_in_the_registers_of_their_threads(kernel: str) -> None:
    """Within the loop no tile goes through shared memory, and what it reads it reads four numbers at a time."""
    compiled = compiled_ahead(ClusteringConfiguration(kernel, 64, 1000, "float32").launch(plan.H100)[1], "sm_90")
    loop = loop_of(compiled, "arith.mulf")
    assert any("tensor<64x64xf32" in line for line in loop)
    assert not [line for line in loop if "convert_layout" in line or "local_load" in line]
    assert "ld.global.v4" in compiled.asm["ptx"]


@pytest.mark.parametrize(("op", "H"), [("lstm", 32), ("rnn", 64)])
@pytest.mark.parametrize("backward", [False, True])
def test_only_products_change_their_form_in_a_resident_step(op: str, H: int, backward: bool) -> None:
    """What comes from memory meets them as it is: one conversion for each product's result."""
    case = Configuration(op, backward, 100, 64, H, "float32")
    compiled = compiled_ahead(case.launch(CHIPS["sm_90"])[1], "sm_90")
    converted = [line for line in loop_of(compiled, "tt.dot") if "convert_layout" in line]
    assert len(converted) <= (4 if op == "lstm" and not backward else 1), converted


def loop_of(compiled: Any, needle: str) -> list[str]:
    """The lines of the innermost loop around the first line that has ``needle``."""
    lines = compiled.asm["ttgir"].splitlines()
    place = next(
        index for index, line in enumerate(lines) if needle in line and any("scf.for" in x for x in lines[:index])
    )
    first = max(index for index in range(place) if "scf.for" in lines[index])
    indent = len(lines[first]) - len(lines[first].lstrip())
    last = next(index for index in range(place, len(lines)) if lines[index].startswith(" " * indent + "}"))
    return lines[first:last]


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "target"),
    [(case, target) for target in TARGETS for case in ALL + CLUSTERING_ALL if triton_resources.compiles(case, target)],
    ids=str,
)
def test_every_configuration_compiles(case: Configuration, target: str) -> None:
    check(case, target)


def test_every_kernel_and_regime_is_among_the_configurations() -> None:
    seen = {(case.launch(plan.H100)[1].kernel.__name__, case.launch(plan.H100)[0].regime) for case in ALL}
    passes = [f"{op}_{which}" for op in ("lstm", "rnn") for which in ("forward", "backward")]
    assert seen == {
        pair
        for name in passes
        for pair in (
            (f"{name}_resident", "resident"),
            (f"{name}_spread", "persistent"),
            (f"{name}_spread", "step"),
        )
    }


def test_another_length_and_batch_compile_nothing_new() -> None:
    """What a kernel is compiled for does not hang on T or, within a tile, on B."""
    kernels = set()
    for T, B in ((64, 16), (65, 16), (64, 15)):
        launch = Configuration("lstm", False, T, B, 512, "float16").launch(plan.H100)[1]
        kernels.add((launch.kernel.__name__, tuple(launch.constants.items())))
        assert {"T", "B", "begin", "count"} <= launch.arguments.keys() - launch.constants.keys()
    assert len(kernels) == 1


def test_lengths_batches_and_places_are_run_time_arguments() -> None:
    """Of every kernel of a recurrence: neither compiled in, nor told apart by what divides them."""
    kernels = {launch.kernel.__name__: launch.kernel for launch in (case.launch(plan.H100)[1] for case in ALL)}
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        at_run_time = {"T", "B"} | ({"begin", "count"} if name.endswith("spread") else set())
        found = {param.name for param in kernel.params if param.do_not_specialize and not param.is_constexpr}
        assert found == at_run_time, name


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", ["lstm", "rnn"])
def test_what_programs_exchange_is_loaded_wide_whatever_the_size(op: str, backward: bool) -> None:
    """16 bytes at a time of rows of 331 numbers; and the only atomics are the integers of the barrier."""
    compiled = compiled_ahead(Configuration(op, backward, 64, 16, 331, "float16").launch(plan.H100)[1], "sm_90")
    loads = re.findall(r"ld\.global\.cg\S*", compiled.asm["ptx"])
    assert loads
    assert all(".v4" in load for load in loads), loads
    atomics = [line for line in compiled.asm["ttir"].splitlines() if "atomic" in line and "tt." in line]
    assert atomics
    assert all("i32" in line and not re.search(r"\b(f16|bf16|f32)\b", line) for line in atomics), atomics


@pytest.mark.parametrize("backward", [False, True])
def test_many_weights_have_offsets_of_64_bits(backward: bool) -> None:
    launch = Configuration("rnn", backward, 1, 16, 50000, "float16").launch(plan.H100)[1]
    lines = compiled_ahead(launch, "sm_90").asm["ttir"].splitlines()
    # The tile of weights is the one of three dimensions that ends in the units of a program.
    units = f"x{launch.plan.BH}x!tt.ptr<f16>>, tensor<"
    far = [line for line in lines if "tt.addptr" in line and units in line and line.count("x!tt.ptr") == 1]
    far = [line for line in far if re.search(r"tensor<\d+x\d+x\d+xi", line)]
    assert any("xi64>" in line for line in far), far


def test_plans_cover_every_unit_and_sequence_once() -> None:
    for gates in (1, 4):
        for H in (1, 17, 100, 129, 512, 650, 1000, 1792, 3000, 9000):
            for B in (1, 16, 33, 300):
                for backward in (False, True):
                    made = plan.choose(plan.Shape(gates, backward, 10, B, H, 2), plan.H100)
                    assert made.programs * made.BH >= H > (made.programs - 1) * made.BH
                    assert made.groups <= -(-B // made.BB)
                    assert made.regime != "persistent" or made.programs * made.groups <= plan.H100.programs
                    K = gates * H if backward else H
                    of_warp = made.cut.registers * plan.PIECE + made.cut.full * made.cut.KC + made.cut.last
                    assert made.warps * of_warp >= K or made.regime == "resident"


@pytest.mark.parametrize(("target", "backward"), [("sm_80", False), ("sm_90", False), ("sm_90", True)])
def test_held_weights_fit_and_are_held_in_part_from_one_size_on(target: str, backward: bool) -> None:
    kept = []
    for H in range(129, 108 * 16 if target == "sm_80" else 132 * 16, 16):
        made = plan.choose(plan.Shape(4, backward, 10, 16, H, 2), CHIPS[target])
        cut, columns = made.cut, made.BH if backward else 4 * made.BH
        shared = min(cut.held, cut.full) * cut.KC + cut.last * (cut.held > cut.full)
        assert 0 < made.warps * shared * columns * 2 < CHIPS[target].shared
        if cut.registers:
            assert cut.kept == "held"
            assert cut.registers * plan.PIECE * columns * 2 <= 32 * plan.REGISTER_BYTES[CHIPS[target].capability]
        kept.append(cut.kept)
    first = kept.index("held in part")
    assert kept == ["held"] * first + ["held in part"] * (len(kept) - first)


def test_an_h100_holds_the_weights_of_1900_units_whole() -> None:
    """Of 16 bits, both passes, whatever the batch; and somewhat more."""
    for H in (1900, 2048):
        for B in (1, 32, 256):
            for backward in (False, True):
                made = plan.choose(plan.Shape(4, backward, 1000, B, H, 2), plan.H100)
                assert (made.regime, made.cut.kept) == ("persistent", "held")


@pytest.mark.parametrize("backward", [False, True])
def test_weights_in_registers_stay_there(backward: bool) -> None:
    """In the loop over time those alone are not read from shared memory: they come from what a product has left."""
    made, launch = Configuration("lstm", backward, 64, 16, 1900, "float16").launch(CHIPS["sm_90"])
    assert made.cut.registers > 0
    loop = loop_of(compiled_ahead(launch, "sm_90"), "cacheModifier = cg")
    weights = [line for line in loop if "opIdx = 1" in line and "tt.dot" not in line]
    from_shared = [line for line in weights if "local_load" in line]
    in_place = [line for line in weights if "convert_layout" in line]
    assert len(from_shared) == made.cut.held
    assert len(in_place) == made.cut.registers
    assert all("#linear" in line for line in in_place), in_place


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="no field to choose named colour"), plan.override(colour="red"):
        pass
