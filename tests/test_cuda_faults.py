"""The emulator finds faults: kernels that are spoilt in one place give wrong numbers, wait for ever or are refused, in
one schedule at least. So what ``test_cuda_emulated`` finds right has been looked at."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import cuda_build
import pytest
import torch
from cuda_support import COMPILER, ROOT, emulated, load, needs_launchers
from recurrence_cases import Case, inputs_of

from fastseq.cuda import plan
from fastseq.testing import assert_matches_reference

pytestmark = [needs_launchers, pytest.mark.full, pytest.mark.skipif(COMPILER is None, reason="needs g++")]

SCHEDULES = range(5)

# The header, what is in it once, and what takes its place.
FAULTS = {
    "one buffer of h for two steps": ("lstm_cluster_forward", "s.h_at(1 - buffer,", "s.h_at(buffer,"),
    "the partner's sums before it has given them": ("lstm_cluster_forward", "machine::pair_barrier(group);", ""),
    "a slot filled that others still read": (
        "lstm_cluster_forward",
        "if (warp == 0 && step > 0 && step - 1 + kRingSlots < T)\n"
        "        ring.fill(s, gone + step - 1 + kRingSlots, rows, walk.row(step - 1 + kRingSlots, first), -1, lane);",
        "if (warp == 0 && step + kRingSlots < T)\n"
        "        ring.fill(s, gone + step + kRingSlots, rows, walk.row(step + kRingSlots, first), -1, lane);",
    ),
    "steps read before they came": ("lstm_cluster_forward", "ring.wait(gone + step);", ""),
    "h of units that are not there": (
        "lstm_cluster_forward",
        "unit_ok && row < rows ? cells[n].h : 0.0f",
        "cells[n].h",
    ),
    "a new tile while others use the last": (
        "lstm_cluster_forward",
        "machine::block_barrier();\n    if (warp == 0)",
        "if (warp == 0)",
    ),
    "blocks that have not begun": (
        "lstm_cluster_forward",
        "machine::cluster_arrive();\n    machine::cluster_wait();\n\n    for",
        "for",
    ),
    "receivers that are left out": (
        "lstm_cluster_forward",
        "i < kBlocks; i += ClusterShape::kReceiverStride",
        "i < 8; i += 8",
    ),
    "one place for the shares of two steps": (
        "lstm_cluster_backward",
        "s.arrived_at(1 - buffer, sender",
        "s.arrived_at(0, sender",
    ),
    "gates' gradients that are not there yet": (
        "lstm_cluster_backward",
        "machine::block_barrier();\n\n      // Eight gradients",
        "// Eight gradients",
    ),
    "gradients of units that are not there": ("lstm_cluster_backward", "if (!ok) d = {};", ""),
    "gradients across a cut": ("lstm_cluster_backward", "if (cut) dh[n] = d.c = 0.0f;", ""),
    "h that is not all written": (
        "grid",
        "machine::block_barrier();\n  if (machine::thread() == 0) machine",
        "machine",
    ),
    "signals that nobody waits for": (
        "grid",
        "machine::await(signals + i, static_cast<std::uint32_t>(step));",
        "static_cast<void>(signals), static_cast<void>(step);",
    ),
    "h of units of other blocks before they have seen it": (
        "lstm_grid_forward",
        "(step % 2 ? static_cast<std::int64_t>(B) * HP : 0)",
        "(step % 2 ? 0 : static_cast<std::int64_t>(B) * HP)",
    ),
    "sums that others still read": ("lstm_grid_forward", "buffer = 1 - buffer", "buffer = 0"),
    "gradients of the gates that others still make": ("lstm_grid_backward", "await_all(p.signals, step);", ";"),
    "gradients of a step that began anew": ("lstm_grid_backward", "step > 0 && !cut_after", "step > 0"),
    "sums of gradients that others still read": ("lstm_grid_backward", "buffer = 1 - buffer", "buffer = 0"),
    "shares of a step that began anew": (
        "lstm_cluster_backward",
        "step > 0 && !(kFlags && (flags[n] & kCutAfter))",
        "step > 0",
    ),
}


def spoilt(folder: Path, header: str, before: str, after: str) -> Path:
    """The emulator with that change in a header, of bfloat16 alone."""
    kernels = f"{header if 'cluster' in header else 'lstm_grid'}_bfloat16.cu"
    shutil.copytree(cuda_build.CUDA, folder / "cuda")
    changed = folder / "cuda" / f"{header}.h"
    text = changed.read_text(encoding="utf-8")
    assert text.count(before) == 1, before
    changed.write_text(text.replace(before, after), encoding="utf-8")
    right = cuda_build.build_emulator(ROOT / "build" / "emulated")
    objects = {path.name: path for path in right.parent.glob("*.o")}
    name = cuda_build.emulator_object(cuda_build.CUDA / kernels)
    objects[name] = folder / name
    flags = [*cuda_build.EMULATOR_FLAGS, "-iquote", str(folder)]
    command = cuda_build.host_command(folder / "cuda" / kernels, objects[name], cuda_build.EMULATOR, flags)
    cuda_build.run_all([command], 1)
    module = folder / right.name
    cuda_build.link_emulator(list(objects.values()), module)
    return module


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, tmp_path: Path, seed: int) -> None:
    header, before, after = FAULTS[fault]
    assert found_in(load(spoilt(tmp_path, header, before, after)), header, seed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("header", sorted({header for header, _, _ in FAULTS.values()}))
def test_nothing_is_found_where_nothing_is_spoilt(header: str, tmp_path: Path, seed: int) -> None:
    unchanged = "namespace fastseq::cuda {"
    assert not found_in(load(spoilt(tmp_path, header, unchanged, unchanged)), header, seed)


def found_in(module: ModuleType, header: str, seed: int) -> list[str]:
    """What is wrong with a bfloat16 LSTM by the kernels of a header in an emulator, by schedule."""
    inputs = inputs_of(Case(7, 19, 3, 71, time="lengths+reset"), 4, torch.bfloat16)
    fields = {"regime": "cluster", "build": 0} if "cluster" in header else {"regime": "grid", "build": 1}
    found = []
    for schedule in SCHEDULES:
        with emulated(schedule, module), plan.override(**fields):
            try:
                assert_matches_reference("lstm", inputs, implementation="cuda", seed=seed)
            except (AssertionError, RuntimeError) as error:
                found.append(str(error).splitlines()[0])
    return found
