"""Options, markers and fixtures of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import cpu
from fastseq.ops import dispatch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every combination, not only the quick tier")
    parser.addoption("--seed", type=int, default=None, help="the seed of the random inputs (default: a fresh one)")
    parser.addoption("--share", default="0/1", help="I/N: of N shares of the tests that of number I, from 0 (all)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: every combination; runs only with --full (make test-full)")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "long: begins first, so that no core waits for it at the end")
    if find_spec("hypothesis") is not None:  # the tests marked gpu do without it
        set_search(everything=config.getoption("--full"))


def set_search(everything: bool) -> None:
    """The quick tier draws the same examples every time: its answer is that of the code. The full tier searches."""
    from hypothesis import settings

    settings.register_profile("quick", derandomize=True, deadline=None)
    settings.register_profile("full", deadline=None)
    settings.load_profile("full" if everything else "quick")


# Instruction sets that have kernels of their own for these dtypes alone; for the rest they hand on those of avx512.
KERNELS_FOR = {"amx": {torch.bfloat16, torch.float32}, "avx512_bf16": {torch.bfloat16}}


def repeats_another_set(item: pytest.Item) -> bool:
    """Whether a test names such an instruction set, and no dtype for which it has kernels of its own."""
    values = (
        list(item.callspec.params.values()) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else []
    )
    sets = [value.removeprefix("cpp-") for value in values if isinstance(value, str)]
    dtypes = {value for value in values if isinstance(value, torch.dtype)}
    return any(name in KERNELS_FOR and not dtypes & KERNELS_FOR[name] for name in sets)


def share_of(items: list[Any], share: str) -> list[Any]:
    """Of "I/N" every N-th, from number I on."""
    number, shares = map(int, share.split("/"))
    return items[number::shares]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full, on_gpu = config.getoption("--full"), torch.cuda.is_available()

    def runs(item: pytest.Item) -> bool:
        if not full and (item.get_closest_marker("full") or repeats_another_set(item)):
            return False
        return on_gpu or not item.get_closest_marker("gpu")

    kept = share_of([item for item in items if runs(item)], config.getoption("--share"))
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed, already given to torch; a failing test shows it, and ``--seed`` brings it back."""
    given = request.config.getoption("--seed")
    chosen = int.from_bytes(os.urandom(4), "little") if given is None else given
    print(f"seed: {chosen} (repeat with --seed {chosen})")
    torch.manual_seed(chosen)
    return chosen


# Every kernel that runs here: the reference, and the C++ kernels of each instruction set.
BACKENDS = ["reference", *(f"cpp-{isa}" for isa in cpu.isas())]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an implementation, which is forced while the test runs."""
    name, _, isa = request.param.partition("-")
    with dispatch.use(name):
        if isa:
            # However small the batch of a test, the kernels that are meant for large ones run.
            with cpu.use_isa(isa), cpu.use_split_rows(1):
                yield name
        else:
            yield name


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN (integers: of ones), so that an output that was not written shows."""

    def poisoned(make: Any) -> Any:
        def fresh(*args: Any, **kwargs: Any) -> Tensor:
            made: Tensor = make(*args, **kwargs)
            if made.is_meta or type(made) is not Tensor:
                return made
            with torch.no_grad():
                return made.fill_(float("nan") if made.is_floating_point() else 1)

        return fresh

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch, "frombuffer"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
