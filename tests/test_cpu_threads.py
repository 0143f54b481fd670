"""What the C++ kernels promise beside their numbers: floating-point mode, forks, threads, memory."""

from __future__ import annotations

import concurrent.futures
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import cpu

# 16 H^2 bytes of recurrent weights: enough for two threads to share the hidden units and wait for each other.
T, B, I, H = 12, 8, 40, 192


def train(module: fastseq.LSTM | fastseq.RNN, x: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    y, _ = module(x)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *module.parameters()])]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    # By NumPy: torch.equal of a large tensor starts threads, which a forked child cannot.
    return all(np.array_equal(one.numpy(), other.numpy()) for one, other in zip(got, expected, strict=True))


@pytest.fixture
def module(seed: int) -> fastseq.LSTM:
    return fastseq.LSTM(I, H)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_denormals_are_flushed_inside_and_kept_outside(module: fastseq.LSTM, two_threads: None) -> None:
    tiny = torch.finfo(torch.float32).tiny
    denormal = torch.tensor([tiny / 4])
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        state = (torch.zeros(1, B, H), torch.full((1, B, H), tiny))
        _, (_, c_n) = module(torch.zeros(1, B, I), state)  # the forget gate halves it
        assert torch.equal(c_n, torch.zeros_like(c_n))
        stepped = module.step(torch.zeros(B, I), state)[1][1]
        assert torch.equal(stepped, torch.zeros_like(c_n))
    assert (denormal * 0.5).item() > 0
    with pytest.raises(ValueError, match="Expected hidden"):
        module(torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H + 1)))
    assert (denormal * 0.5).item() > 0
    if torch.set_flush_denormal(True):
        try:
            train(module, torch.zeros(T, B, I))
            assert (denormal * 0.5).item() == 0
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_computes_the_same_and_ends(module: fastseq.LSTM, two_threads: None) -> None:
    x = torch.randn(T, B, I)
    expected = train(module, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if same(train(module, x), expected) else 1)
    end = time.monotonic() + 60
    while (waited := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert waited[1] == 0
    assert same(train(module, x), expected)


def test_threads_of_python_at_once_and_another_number_of_threads_meanwhile(module: fastseq.LSTM) -> None:
    inputs = [torch.randn(steps, batch, I) for steps, batch in ((T, B), (T + 3, 1), (2, 3 * B))]
    before = torch.get_num_threads()
    try:
        expected = [train(module, x) for x in inputs]
        with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
            running = [pool.submit(lambda x: [train(module, x) for _ in range(20)], x) for x in inputs]
            count = 0
            while not all(each.done() for each in running):
                count += 1
                torch.set_num_threads(1 + count % 3)
                time.sleep(0.001)
        for each, wanted in zip(running, expected, strict=True):
            assert all(same(got, wanted) for got in each.result())
    finally:
        torch.set_num_threads(before)


# Weights that fit the cache of a core only where several share them, so that threads go about it another way; and sums
# of more numbers than one chain of additions takes.
SHARED = [(3, 12, 300, 300, 0), (3, 33, 200, 200, 0), (2, 17, 530, 270, 0), (2, 40, 64, 200, 100), (2, 13, 700, 725, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("T", "B", "I", "H", "P"), SHARED)
def test_the_same_bits_from_any_number_of_threads(
    T: int, B: int, I: int, H: int, P: int, isa: str, dtype: torch.dtype, seed: int, two_threads: None
) -> None:
    modules = [fastseq.LSTM(I, H, proj_size=P, dtype=dtype), fastseq.RNN(I, H, dtype=dtype)]
    x = torch.randn(T, B, I, dtype=dtype)
    with cpu.use_isa(isa):
        for module in modules:
            torch.set_num_threads(1)
            expected = train(module, x)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, train(module, x), expected)), threads


def test_memory_stays_flat_over_calls_of_random_lengths(seed: int) -> None:
    module = fastseq.LSTM(16, 24)
    lengths = torch.randint(1, 200, (1200,)).tolist()

    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    for steps in [200, *lengths[:200]]:
        train(module, torch.randn(steps, 5, 16))
    before = peak_mib()
    for steps in lengths[200:]:
        train(module, torch.randn(steps, 5, 16))
    assert peak_mib() - before < 8


ON_ONE_CORE = """
import os, time
# Before any other thread is there, so that all inherit it.
os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))})
import torch, fastseq
module, x = fastseq.LSTM(40, 192), torch.randn(300, 8, 40)
def seconds(threads):
    torch.set_num_threads(threads)
    with torch.no_grad():
        module(x)
        start = time.perf_counter()
        module(x)
        return time.perf_counter() - start
print(min(seconds(1) for _ in range(5)), min(seconds(2) for _ in range(5)))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be held to one core here")
def test_a_thread_whose_partner_has_no_core_gives_way() -> None:
    """Two threads on one core wait for each other at each of 300 steps: a spin until the time slice ends would take
    seconds."""
    result = subprocess.run(
        [sys.executable, "-c", ON_ONE_CORE], capture_output=True, text=True, timeout=300, check=True
    )
    one, two = map(float, result.stdout.split())
    assert two < 5 * one + 0.1, (one, two)


@pytest.mark.parametrize("layer_norm", ["haste", "torchaudio"])
def test_normalised_rows_wait_for_the_chunk_before(layer_norm: str) -> None:
    """A row of a normalised step reads what other threads projected, which they must not overwrite too soon."""
    layer, x = fastseq.LSTM(256, 256, layer_norm=layer_norm), torch.randn(48, 32, 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            expected = layer(x)[0]
            torch.set_num_threads(2)
            wrong = [n for n in range(40) if not torch.equal(layer(x)[0], expected)]
    finally:
        torch.set_num_threads(before)
    assert not wrong
