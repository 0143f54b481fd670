"""What the interpreter does not do by itself: programs of a launch side by side, and offsets beyond 32 bits.

Not collected by itself: see ``triton_interpreted.py``. The interpreter runs the programs of a launch one after the
other, so that those which wait for each other would never come back. Here each program of a persistent launch is a
process of its own, on tensors in shared memory: the protocol of the barrier and of the two places of the exchange is
run as it is. What a GPU's memory model adds to it is not.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from recurrence_cases import Case, inputs_of
from torch import Tensor
from triton.runtime import interpreter

from fastseq.kernels import device, lstm, plan, rnn
from fastseq.kernels.launch import Launch
from fastseq.ops.tape import padded
from fastseq.testing import assert_matches_reference, compare_tensor

OPS = {"lstm": 4, "rnn": 1}
SECONDS = 300


def without_copies(patch: pytest.MonkeyPatch) -> None:
    """Without its last act, copying every tensor of the launch onto itself."""
    patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def one_program(launch: Launch, program: tuple[int, int]) -> None:
    """In a child: this program alone, which believes to be one of the whole grid."""
    patch, builder = pytest.MonkeyPatch(), interpreter.interpreter_builder
    without_copies(patch)
    builder.grid_dim, builder.grid_idx = (*launch.plan.grid, 1), (*program, 0)
    patch.setattr(builder, "set_grid_dim", lambda *_: None)
    patch.setattr(builder, "set_grid_idx", lambda *_: None)
    launch.kernel[(1,)](**launch.arguments, **launch.constants)


def side_by_side(ran: list[int]) -> Callable[[Launch], None]:
    """A ``Launch.run`` that starts all programs at once; ``ran`` receives how many."""

    def run(launch: Launch) -> None:
        for value in launch.arguments.values():
            if isinstance(value, Tensor):
                value.share_memory_()
        fork = multiprocessing.get_context("fork")
        programs = itertools.product(*(range(size) for size in launch.plan.grid))
        children = [fork.Process(target=one_program, args=(launch, program), daemon=True) for program in programs]
        for child in children:
            child.start()
        for child in children:
            child.join(SECONDS)
        assert [child.exitcode for child in children] == [0] * len(children), "a program failed, or waits for ever"
        ran.append(len(children))

    return run


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sync", plan.SYNCS)
@pytest.mark.parametrize("op", OPS)
def test_programs_that_wait_for_each_other(op: str, sync: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs share the units, and do two tiles of the batch one after the other; forwards and BPTT."""
    ran: list[int] = []
    monkeypatch.setattr(Launch, "run", side_by_side(ran))
    # Few steps, since what stands in for cuBLAS here sums all rows of a weight gradient in one chain.
    case = Case(3, 20, 8, 41, bias="none", time="reset" if sync == "flags" else "lengths", reverse=op == "rnn")
    given = [inputs_of(case, OPS[op], torch.float32) for _ in range(2)]
    with plan.override(regime="persistent", BB=16, BH=16, groups=1, sync=sync):
        assert_matches_reference(op, given, implementation="triton", seed=seed)
    assert ran == [3, 3] * 2


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS)
def test_groups_do_not_wait_for_each_other(op: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of two programs: one has two tiles of the batch to do, the other one."""
    ran: list[int] = []
    monkeypatch.setattr(Launch, "run", side_by_side(ran))
    sync = plan.SYNCS[op == "lstm"]
    # Few steps, as above.
    case = Case(2, 33, 3, 20, time="reset", reverse=op == "lstm")
    given = [inputs_of(case, OPS[op], torch.float32) for _ in range(2)]
    with plan.override(regime="persistent", BB=16, BH=16, groups=2, sync=sync):
        assert_matches_reference(op, given, implementation="triton", seed=seed)
    assert ran == [4, 4] * 2


@triton.jit
def functions(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, device.tanh(tl.load(x + at)))
    tl.store(y + n + at, device.logistic(tl.load(x + at)))


def test_tanh_and_the_logistic_are_exact_far_out() -> None:
    """1, 0 and -1 where float32 has nothing nearer, and by the rule everywhere, beyond the ends of exp too."""
    x = torch.cat([torch.linspace(-120, 120, 4092), torch.tensor([-3e38, -1e4, 1e4, 3e38])])
    y = torch.empty(2, x.numel())
    functions[(1,)](x, y, x.numel())
    for name, function, got in (("tanh", torch.tanh, y[0]), ("logistic", torch.sigmoid, y[1])):
        found = compare_tensor(name, got, function(x), function(x.double()))
        assert found.ok, found
    far = x.abs() > 44
    assert torch.equal(y[0][far], x[far].sign())
    assert torch.equal(y[1][x > 44], torch.ones_like(x[x > 44]))
    assert (y[1][x < -104] == 0).all()


# Offsets. A step far into a sequence whose tensors have more than 2^31 numbers, in files that are nearly all holes,
# against the same step of a short one.


STEPS, BATCH, HIDDEN = 4, 2, 16
FAR = 2**31 // (BATCH * HIDDEN) + 2  # even, as STEPS: the places of the exchange change with every step


def tensors(op: str, steps: int, folder: Path | None, backward: bool) -> dict[str, Any]:
    """The tensors of a launch that have a row for each step and sequence; the last rows hold the same in every case."""
    width = padded(HIDDEN)
    columns = {"y": HIDDEN, "tape": OPS[op] * width + 16, "c": width, "grad_y": HIDDEN, "grads": OPS[op] * HIDDEN}
    made: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(1)
    for name, count in columns.items():
        shape = (steps, BATCH, count)
        if folder is None:
            made[name] = torch.zeros(shape)
        else:
            size = steps * BATCH * count
            made[name] = torch.from_file(str(folder / name), shared=True, size=size).view(shape)
        made[name][-STEPS:] = torch.rand(STEPS, BATCH, count, generator=generator)
    flags = torch.zeros(steps, BATCH, dtype=torch.uint8)
    flags[-2, 0] = 1
    made["flags"] = flags
    return made


def run_step(op: str, steps: int, begin: int, folder: Path | None, backward: bool, reverse: bool) -> dict[str, Tensor]:
    """The last rows of every tensor after one step."""
    made = tensors(op, steps, folder, backward)
    generator = torch.Generator().manual_seed(2)
    w_hh = torch.rand(OPS[op] * HIDDEN, HIDDEN, generator=generator) - 0.5
    h, c = (torch.rand(BATCH, HIDDEN, generator=generator) for _ in range(2))
    with plan.override(regime="step"):
        chosen = plan.choose(plan.Shape(OPS[op], backward, steps, BATCH, HIDDEN, 4), plan.H100)
    tape, flags, y = made["tape"], made["flags"], made["y"]
    if op == "lstm" and backward:
        given = (chosen, made["grad_y"], w_hh, tape, made["c"], c, made["grads"], h, c.clone(), flags, reverse)
        launches = lstm.backward_launches(*given)
    elif op == "lstm":
        launches = lstm.forward_launches(chosen, tape, w_hh, None, None, h, c, y, made["c"], flags, reverse)
    elif backward:
        launches = rnn.backward_launches(chosen, made["grad_y"], w_hh, tape, made["grads"], h, flags, reverse)
    else:
        launches = rnn.forward_launches(chosen, tape, w_hh, None, None, h, y, True, flags, "tanh", reverse)
    first = next(launches)
    dataclasses.replace(first, arguments={**first.arguments, "begin": begin, "count": 1}).run()
    return {name: value[-STEPS:].clone() for name, value in made.items()} | {"h": h, "c state": c}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_offsets_have_64_bits(
    op: str, backward: bool, reverse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_copies(monkeypatch)
    # In reverse the last rows are the first steps.
    near, far = (1, 1) if reverse else (STEPS - 2, FAR - 2)
    expected = run_step(op, STEPS, near, None, backward, reverse)
    found = run_step(op, FAR, far, tmp_path, backward, reverse)
    untouched = tensors(op, STEPS, None, backward)
    assert FAR * BATCH * HIDDEN > 2**31
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    written = ["tape", "grads"] if backward else ["y", "tape"]
    assert any(not torch.equal(expected[name], untouched[name]) for name in written)
