"""What Triton makes of a launch of the recurrence's kernels, by its own way to a GPU, with a stand-in for the driver.

``test_triton_compile.py`` says itself what a kernel is compiled for. Here Triton finds it, from the arguments, as on a
GPU; nothing is launched, and the tensors are the CPU's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from recurrence_cases import Case, inputs_of

triton = pytest.importorskip("triton", reason="triton is not installed (it is optional)")

from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks import gpu_ahead, gpu_cases  # noqa: E402
from fastseq import functional as F  # noqa: E402
from fastseq.kernels import launch, lstm, plan, rnn  # noqa: E402
from fastseq.testing import use_implementation  # noqa: E402

KERNELS: dict[str, list[Any]] = {
    "lstm": [
        lstm.lstm_forward_spread,
        lstm.lstm_backward_spread,
        lstm.lstm_forward_resident,
        lstm.lstm_backward_resident,
    ],
    "rnn": [rnn.rnn_forward_spread, rnn.rnn_backward_spread, rnn.rnn_forward_resident, rnn.rnn_backward_resident],
}


class Driver:
    """Says what the driver of an H100 says, and keeps what it is given to launch."""

    def __init__(self) -> None:
        self.device, self.streams = 0, {0: 100, 1: 200}
        self.launched: list[tuple[str, tuple[int, ...], int]] = []  # kernel, grid, stream
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (name, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": plan.H100.shared},
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.streams[device]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: str, *_: Any) -> None:
            self.launched.append((function, (x, y, z), stream))

        return launch


def forget() -> None:
    """What this process has compiled; what is on disk stays."""
    for kernel in [*KERNELS["lstm"], *KERNELS["rnn"]]:
        kernel.device_caches.clear()


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    """As if there were one, and nothing were compiled yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that CPU tensors are let through: triton itself has been imported
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    for module in (lstm, rnn):
        monkeypatch.setattr(module, "chip_of", lambda _: plan.H100)
    forget()
    yield made
    forget()


def compiled(op: str) -> dict[str, int]:
    """How often each kernel of an operation has been compiled, those that have been."""
    counts = {
        kernel.fn.__name__: sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in KERNELS[op]
    }
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
    ("op", "regime", "H"), [("lstm", "persistent", 40), ("rnn", "resident", 20), ("rnn", "step", 20)]
)
def test_no_length_and_no_batch_compiles_anew(op: str, regime: str, H: int) -> None:
    """Among them those that Triton tells apart where it is let: 1, and multiples of 16."""
    fields = {"regime": regime, "BB": 16} | ({"BH": 16} if regime != "resident" else {})
    with (
        mock.patch.object(launch.Launch, "run", gpu_ahead.compile_launch),
        plan.override(**fields),
        use_implementation("triton"),
    ):
        for T, B in ((2, 3), (1, 1), (16, 16), (7, 5), (33, 1), (64, 48)):
            inputs = inputs_of(Case(T, B, 4, H), {"lstm": 4, "rnn": 1}[op], torch.float16)
            for value in inputs.values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.requires_grad_()
            getattr(F, op)(**inputs)[0].sum().backward()
    kind = "resident" if regime == "resident" else "spread"
    assert compiled(op) == {f"{op}_forward_{kind}": 1, f"{op}_backward_{kind}": 1}


def test_what_is_compiled_ahead_serves_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """From disk, at another length: then no kernel is made of its source again."""
    # torch.testing._internal, once a test of this process has imported it, forbids to set these flags.
    monkeypatch.setattr(gpu_cases.Pair, "precise", lambda self: None)
    case = gpu_cases.Case("lstm", 2, 5, 3, 16)
    gpu_ahead.compile_job((case, "float16", {"depth": 0}), torch.device("cpu"))
    found = compiled("lstm")
    assert found == {"lstm_forward_resident": 2, "lstm_backward_resident": 1}  # without a tape and with one
    forget()
    with mock.patch.object(triton.compiler.ASTSource, "make_ir", side_effect=AssertionError("compiled again")):
        gpu_ahead.compile_job((replace(case, T=9), "float16", {"depth": 0}), torch.device("cpu"))
    assert compiled("lstm") == found


def test_every_layer_kind_and_variant_is_compiled_ahead() -> None:
    found = [*gpu_ahead.jobs()]
    assert {(replace(case, T=2), kind) for case in gpu_cases.CASES for kind in gpu_cases.KINDS} == {
        (case, kind) for case, kind, fields in found if not fields
    }
    assert [fields for case, _, fields in found if fields and case.H == 768] == [*gpu_ahead.VARIANTS]


def test_a_call_goes_to_the_current_stream_of_the_current_device(driver: Driver) -> None:
    """One launch for the whole sequence, cooperative, and the next call on another stream and then another device."""
    inputs = inputs_of(Case(6, 20, 4, 40), 4, torch.float16)
    with plan.override(regime="persistent", BB=16, BH=16), use_implementation("triton"):
        F.lstm(**inputs)
        driver.streams[0] = 101
        F.lstm(**inputs)
        driver.device = 1
        F.lstm(**inputs)
    name, grid = "lstm_forward_spread", (3, 2, 1)
    assert driver.launched == [(name, grid, 100), (name, grid, 101), (name, grid, 200)]
    for caches in lstm.lstm_forward_spread.device_caches.values():
        assert [kernel.metadata.launch_cooperative_grid for kernel in caches[0].values()] == [True]


def test_the_current_device_is_that_of_the_tensors_while_launching(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def device(which: torch.device) -> Iterator[None]:
        seen.append(f"in {which}")
        yield
        seen.append("out")

    monkeypatch.setattr(torch.cuda, "device", device)
    with launch.kernel_context(SimpleNamespace(device=torch.device("cuda", 1))):  # type: ignore[arg-type]
        seen.append("launch")
    assert seen == ["in cuda:1", "launch", "out"]


def test_no_shape_needs_more_than_a_few_kernels() -> None:
    """Whatever T and B are: a plan's tiles hang on B, but not every B has tiles of its own."""
    for gates in (1, 4):
        for H, item, backward in itertools.product((96, 331, 768, 1792), (2, 4), (False, True)):
            shapes = [plan.Shape(gates, backward, T, B, H, item) for T in (2, 1000) for B in range(1, 1025)]
            plans = {plan.choose(shape, plan.H100) for shape in shapes}
            assert len({replace(made, groups=0) for made in plans}) <= 5
