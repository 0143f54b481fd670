"""Bad input is refused by the argument's name, what was expected and what came; nothing crashes the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from recurrence_cases import Case, inputs_of
from torch import Tensor

import fastseq
from fastseq import functional as F
from fastseq.errors import ShapeError
from fastseq.ops import dispatch
from fastseq.testing import implementations, use_implementation

T, B, I, H, P = 4, 3, 5, 6, 2


def call(op: str, **changes: Any) -> Any:
    """The op on good inputs but for ``changes``."""
    inputs = inputs_of(Case(T, B, I, H, P=P), 4 if op == "lstm" else 1, torch.float32)
    return getattr(F, op)(**inputs | changes)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.fixture(params=["lstm", "rnn"])
def op(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_good_inputs_are_accepted(op: str) -> None:
    call(op)
    call(op, lengths=torch.tensor([0, 4, 2], dtype=torch.uint8))
    call(op, lengths=torch.tensor([0, 4, 2]), reset=torch.zeros(T, B, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", randn(T, I), r"expected shape \[T, B, I\], got \[4, 5\]"),
        ("x", randn(T, B, I, 1), r"expected shape \[T, B, I\], got \[4, 3, 5, 1\]"),
        ("x", randn(0, B, I), r"sequence length to be larger than 0"),
        ("h0", randn(1, B, H), "got"),
        ("h0", randn(B + 1, H), "got"),
        ("h0", randn(1, 1), "got"),  # would broadcast
        ("w_hh", randn(H), "got"),
        ("w_hh", randn(H, H + 1), "got"),
        ("w_ih", randn(0, I), "hidden size H of at least 1"),
        ("b_ih", randn(1), "got"),  # would broadcast
        ("b_hh", randn(2, H), "got"),
        ("lengths", torch.tensor([1, 2]), r"expected shape \[B\] = \[3\], got \[2\]"),
        ("lengths", torch.tensor([[1, 2, 3]]), "got"),
        ("lengths", torch.tensor([1, -1, 2]), "values from 0 to T = 4, got -1"),
        ("lengths", torch.tensor([1, 5, 2]), "values from 0 to T = 4, got 5"),
        ("reset", torch.zeros(B, T, dtype=torch.bool), r"expected shape \[T, B\] = \[4, 3\], got \[3, 4\]"),
        ("reset", torch.zeros(T, dtype=torch.bool), "got"),
    ],
)
def test_shapes(op: str, name: str, value: Tensor, words: str) -> None:
    with pytest.raises(ShapeError, match=f"^{name}: .*{words}") as caught:
        call(op, **{name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    assert fastseq.ShapeError is ShapeError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", randn(T, B, I + 1)),  # it is w_ih that does not fit it
        ("x", randn(T, B + 1, I)),
        ("x", randn(T, B, 0)),
        ("w_ih", randn(H + 1, I)),
        ("w_ih", randn(H, I, 1)),
    ],
)
def test_sizes_that_disagree(op: str, name: str, value: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"expected .*, got"):
        call(op, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("c0", randn(B, P)),
        ("c0", randn(B)),
        ("w_hr", randn(P, H + 1)),
        ("w_hr", randn(H)),
        ("w_hr", randn(0, H)),
        ("w_hr", None),
    ],
)
def test_shapes_of_the_lstm_alone(name: str, value: Tensor | None) -> None:
    with pytest.raises(ShapeError, match=r"expected .*, got"):
        call("lstm", **{name: value})


@pytest.mark.parametrize("name", ["x", "h0", "w_ih", "w_hh", "b_ih", "b_hh"])
def test_kinds(op: str, name: str) -> None:
    good = inputs_of(Case(T, B, I, H, P=P), 4 if op == "lstm" else 1, torch.float32)[name]
    for value, words in (
        (good.tolist(), "expected a Tensor.*, got list"),
        (good.double(), "float64"),
        (good.half(), "float16"),
        (good.long(), "expected one of the dtypes .*, got torch.int64"),
        (good.to(torch.complex64), "got torch.complex64"),
        (good.to("meta"), "device"),
        (good.to_sparse(), "layout"),
    ):
        with pytest.raises(TypeError, match=words) as caught:
            call(op, **{name: value})
        # With x itself changed, it is the next one that does not agree with it.
        assert name == "x" or str(caught.value).startswith(f"{name}: ")


def test_missing_tensors(op: str) -> None:
    for name in ("x", "h0", "w_ih", "w_hh"):
        with pytest.raises(TypeError, match=f"^{name}: expected a Tensor, got NoneType"):
            call(op, **{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lengths", torch.tensor([1.0, 2.0, 3.0])),
        ("lengths", torch.tensor([1.0, 2.0, 3.0], requires_grad=True)),
        ("lengths", torch.tensor([True, False, True])),
        ("lengths", [1, 2, 3]),
        ("reset", torch.zeros(T, B)),
        ("reset", torch.zeros(T, B, dtype=torch.uint8)),
        ("reset", torch.zeros(T, B, requires_grad=True)),
        ("reset", [[False] * B] * T),
    ],
)
def test_kinds_of_the_time_options(op: str, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected .*, got"):
        call(op, **{name: value})


def test_nonlinearity() -> None:
    with pytest.raises(ValueError, match=r"^nonlinearity: expected one of tanh, relu, sigmoid, got 'gelu'"):
        call("rnn", nonlinearity="gelu")


def test_torch_raises_what_these_are_caught_by() -> None:
    """The same mistake made with torch.nn is caught by the same ``except``."""
    module = torch.nn.LSTM(I, H)
    for bad in (randn(0, B, I), randn(T, B, I + 1)):
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            module(bad)
        with pytest.raises(type(theirs.value)):
            call("lstm", x=bad)


def test_lengths_are_not_read_where_they_cannot_be(op: str) -> None:
    """Under a transform or a compiler values are unknown: a length beyond T means T, a negative one 0."""
    inputs = inputs_of(Case(T, B, I, H, P=P), 4 if op == "lstm" else 1, torch.float32)
    function = getattr(F, op)
    wild, tame = torch.tensor([9, -3, 2]), torch.tensor([T, 0, 2])
    expected = function(**inputs, lengths=tame)
    mapped = torch.func.vmap(lambda lengths: function(**inputs, lengths=lengths))(wild[None])
    compiled = torch.compile(lambda lengths: function(**inputs, lengths=lengths), backend="eager", fullgraph=True)(wild)
    for a, b, c in zip(expected, mapped, compiled, strict=True):
        torch.testing.assert_close(a, b[0])
        assert torch.equal(a, c)


# The ops beneath, called past the checks.


def good_call(name: str) -> list[Any]:
    """Arguments of ``torch.ops.fastseq.<name>`` that fit."""
    op, direction = name.split("_")[:2]
    given = inputs_of(Case(T, B, I, H, P=P, time="lengths"), 4 if op == "lstm" else 1, torch.float32)
    tensors = [value for key, value in given.items() if key not in ("reverse", "lengths", "reset")]
    flags = torch.zeros(T, B, dtype=torch.uint8)
    options = [False] if op == "lstm" else ["tanh", False]
    forward = [*tensors, flags, *options, True]
    if direction == "fwd":
        return forward
    with torch.no_grad():
        results = getattr(torch.ops.fastseq, f"{op}_fwd")(*forward)
    states = 3 if op == "lstm" else 2
    grads = [torch.randn_like(value) for value in results[:states]]
    return [*grads, *tensors, flags, results[0], *results[states:], *options, 7]


OPS = ["lstm_fwd", "lstm_bwd", "lstm_bwd_", "rnn_fwd", "rnn_bwd", "rnn_bwd_"]


@pytest.mark.parametrize("name", OPS)
def test_ops_refuse_what_would_read_or_write_out_of_bounds(name: str) -> None:
    function = getattr(torch.ops.fastseq, name)
    good = good_call(name)
    with use_implementation("cpp"):
        function(*good)
        for index, value in enumerate(good):
            if not isinstance(value, Tensor):
                continue
            smaller = [value.narrow(d, 0, value.shape[d] - 1) for d in range(value.dim())]
            # A weight, gradient or state that is too small, of another dtype or of another rank.
            for bad in (*smaller, value.double(), value[None], value[..., None], value.flatten()[:1]):
                args = [*good[:index], bad, *good[index + 1 :]]
                if value.dim() == 1 and bad.shape == value.shape and bad.dtype == value.dtype:
                    continue
                with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
                    function(*args)


@pytest.mark.parametrize("name", OPS)
def test_ops_survive_every_flag(name: str) -> None:
    """Flags are 256 values, and padding that is no suffix is wrong but safe."""
    good = good_call(name)
    position = next(k for k, v in enumerate(good) if isinstance(v, Tensor) and v.dtype == torch.uint8)
    good[position] = torch.randint(0, 256, (T, B), dtype=torch.uint8)
    with use_implementation("cpp"):
        getattr(torch.ops.fastseq, name)(*good)


def test_ops_refuse_unknown_values() -> None:
    with use_implementation("cpp"):
        good = good_call("rnn_fwd")
        with pytest.raises((ValueError, KeyError, RuntimeError)):
            torch.ops.fastseq.rnn_fwd(*["gelu" if value == "tanh" else value for value in good])


# Which implementation serves.


def test_an_implementation_that_cannot_serve_raises() -> None:
    for name in ("triton", "cuda", "nonsense"):
        with (
            pytest.raises(RuntimeError, match=rf"{name!r} was asked for, but cannot serve: "),
            use_implementation(name),
        ):
            pass
    with pytest.raises(ValueError, match="expected one of lstm, rnn"):
        implementations("gru")
    with pytest.raises(ValueError, match="expected one of lstm, rnn"):
        dispatch.serving("gru")


def test_serving_says_what_and_why() -> None:
    assert dispatch.serving("lstm")[0] == "cpp"
    why, there = "the C++ kernels serve CPU tensors only, not cuda", ["reference"]
    names = [name for name in ("triton", "cuda") if dispatch.why_not(name, "cuda") is None]  # where they are installed
    there += names
    if names:
        kernels = " and ".join({"triton": "Triton", "cuda": "CUDA"}[name] for name in names)
        forces = " or ".join(f"FASTSEQ_IMPL={name}" for name in names)
        why = f"the {kernels} kernels have not been verified on a GPU yet ({forces} forces them)"
    why += "; plain layers use torch's own path"
    assert dispatch.serving("lstm", "cuda") == ("reference", why)
    with use_implementation("reference"):
        assert dispatch.serving("lstm") == ("reference", "forced")
    with use_implementation("cpp"), pytest.raises(RuntimeError, match="serve CPU tensors only, not cuda"):
        dispatch.serving("lstm", "cuda")
    assert implementations("rnn", "cuda") == there


@pytest.mark.parametrize("name", ["reference", "triton", "nonsense"])
def test_the_environment_forces_an_implementation(name: str) -> None:
    code = "import torch, fastseq; print(fastseq.LSTM(2, 3)(torch.zeros(4, 1, 2))[0].shape)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FASTSEQ_IMPL": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if name == "reference":
        assert "torch.Size([4, 1, 3])" in ran.stdout, ran.stderr
    else:
        assert ran.returncode == 1
        assert name in ran.stderr.splitlines()[-1]
        assert "RuntimeError" in ran.stderr
