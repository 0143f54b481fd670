"""LSTM.step and RNN.step: a stream gives what the whole sequence gives, and packed weights are never stale."""

from __future__ import annotations

import concurrent.futures
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastseq
from fastseq.nn.streaming import PackedStep

T, B, I, H, L = 5, 3, 4, 6, 2

MODULES: dict[str, Callable[[], Any]] = {
    "lstm": lambda: fastseq.LSTM(I, H, L),
    "lstm-proj-no-bias": lambda: fastseq.LSTM(I, H, L, bias=False, proj_size=2),
    "lstm-peephole-zoneout-clip": lambda: fastseq.LSTM(I, H, L, peephole=True, zoneout=0.2, cell_clip=0.4),
    "lstm-haste": lambda: fastseq.LSTM(I, H, L, layer_norm="haste", recurrent_dropout=0.3, dropout=0.1),
    "lstm-torchaudio": lambda: fastseq.LSTM(I, H, layer_norm="torchaudio"),
    "rnn": lambda: fastseq.RNN(I, H, L, "relu", recurrent_dropout=0.3),
    "keep-type": lambda: fastseq.convert(nn.LSTM(I, H, L), keep_type=True),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest, seed: int) -> Any:
    return MODULES[request.param]().eval()


def stream(module: Any, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for x_t in x:
        y_t, state = module.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs), state


def leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def assert_close(got: Any, expected: Any) -> None:
    for one, other in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each packing of a module."""
    calls: list[int] = []
    init = PackedStep.__init__
    monkeypatch.setattr(PackedStep, "__init__", lambda *args: (calls.append(1), init(*args))[1])
    return calls


def test_a_stream_is_the_sequence(module: Any, packs: list[int]) -> None:
    x = torch.randn(T, B, I)
    _, state = module(torch.randn(2, B, I))
    state = fastseq.functional.detach_state(state)
    with torch.no_grad():
        for start in (None, state):
            assert_close(stream(module, x, start), module(x, start))
        one = None if state is None else torch.utils._pytree.tree_map(lambda v: v[:, 0], state)
        assert_close(stream(module, x[:, 0], one), module(x[:, 0], one))
        assert len(packs) == (0 if module._alters_layers() else 1)
    with torch.inference_mode():
        assert_close(stream(module, x, state), module(x, state))
    module.batch_first = True  # of no meaning for one step
    with torch.no_grad():
        assert stream(module, x)[0].shape[:2] == (T, B)


def test_gradients_pass_through_steps(module: Any) -> None:
    """Where gradients are wanted the operation serves, with the weights themselves."""
    x = torch.randn(T, B, I, requires_grad=True)
    leaves = [x, *module.parameters()]
    got, expected = (
        torch.autograd.grad(outputs[0].square().sum(), leaves) for outputs in (stream(module, x), module(x))
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def by_optimizer(module: Any) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    with torch.enable_grad():
        module(torch.ones(1, 1, I))[0].sum().backward()
    optimizer.step()


def by_reassigning(module: Any) -> None:
    for name, weight in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(weight.detach() * 1.5))


def by_moving_data(module: Any) -> None:
    for weight in module.parameters():
        weight.data = weight.data * 1.5


def by_writing_data(module: Any) -> None:
    for weight in module.parameters():
        weight.data.mul_(1.5)


def by_out(module: Any) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            torch.mul(weight.detach().clone(), 1.5, out=weight)


def by_in_place(module: Any) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight[0] += 1


def by_numpy(module: Any) -> None:
    for weight in module.parameters():
        weight.detach().numpy()[...] *= 1.5


def by_state_dict(module: Any) -> None:
    module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()})


def by_state_dict_of_a_parent(module: Any) -> None:
    parent = nn.Sequential(module)
    parent.load_state_dict({name: value * 1.5 for name, value in parent.state_dict().items()}, assign=True)


def by_vector(module: Any) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, module.parameters())


def by_one_number(module: Any) -> None:
    with torch.no_grad():
        module.weight_hh_l0[-1, -1] += 3


def by_pruning(module: Any) -> None:
    prune.l1_unstructured(module, "weight_hh_l0", amount=0.9)


def by_parametrization(module: Any) -> None:
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(1.5)


CHANGES = [change for name, change in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_kind_of_change_is_noticed(change: Callable[[Any], None], seed: int) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        module = fastseq.LSTM(I, H, L).eval()
        x, state = torch.randn(B, I), (torch.randn(L, B, H), torch.randn(L, B, H))
        with mode():
            before, _ = module.step(x, state)
        assert module._packed is not None
        with torch.no_grad():
            change(module)
        with mode():
            after, _ = module.step(x, state)
            expected = module(x[None], state)[0][0]
        torch.testing.assert_close(after, expected)
        assert not torch.allclose(after, before)


@pytest.mark.parametrize(
    "drop", [lambda m: m.train(), lambda m: m.float().double(), lambda m: m.load_state_dict(m.state_dict())]
)
def test_what_drops_the_packed_weights(drop: Callable[[Any], Any], seed: int) -> None:
    """A write that neither version nor sample shows is seen after train(), a conversion or load_state_dict."""
    # In float64 and with so many rows the whole sequence is made of packed weights too, in the same order.
    module = fastseq.LSTM(64, 64).double().eval()
    x = torch.randn(17, 64, dtype=torch.float64)
    with torch.no_grad():
        module.step(x)
        assert module._packed is not None
        drop(module)
        assert module._packed is None
        assert torch.equal(module.step(x)[0], module(x[None])[0][0])


def test_packed_weights_are_used_as_long_as_they_hold(packs: list[int], seed: int) -> None:
    module = fastseq.LSTM(I, H, L).eval()
    x = torch.randn(B, I)
    with torch.no_grad():
        state = None
        for _ in range(5):
            _, state = module.step(x, state)
        assert len(packs) == 1
        module.weight_ih_l1.mul_(2)
        for _ in range(5):
            _, state = module.step(x, state)
        assert len(packs) == 2
        for other in (x[0], x.repeat(2, 1), x.T.contiguous().T, nn.Parameter(x)):  # another form of the arguments
            module.step(other)
        assert len(packs) == 2
        module.train()
        module.step(x, state)
        assert len(packs) == 3
    module.step(x, state)  # with a gradient
    torch.func.vmap(lambda x: module.step(x)[0])(torch.randn(2, B, I))
    torch.compile(lambda x: module.step(x)[0], backend="eager", fullgraph=True)(x)
    with torch.no_grad(), fastseq.testing.use_implementation("reference"):
        module.step(x, state)
    assert len(packs) == 3


def steps(module: Any, draws: list[Any]) -> list[Tensor]:
    """y, h and c of one step from each draw, stacked."""
    return [torch.stack(each) for each in zip(*(leaves(module.step(*draw)) for draw in draws), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lstm", "proj", "tanh", "relu", "sigmoid"])
def test_the_step_kernel_against_the_reference(kind: str, dtype: torch.dtype, seed: int) -> None:
    """Layers, batches and sizes on both sides of a vector and of a tile, for every instruction set."""
    for batch, inputs, hidden, layers in ((1, 1, 1, 1), (1, 33, 63, 3), (2, 5, 65, 2), (7, 16, 32, 2), (13, 3, 40, 1)):
        if kind == "lstm":
            module: Any = fastseq.LSTM(inputs, hidden, layers, dtype=dtype)
        elif kind == "proj":
            module = fastseq.LSTM(inputs, hidden + 1, layers, bias=False, proj_size=(hidden + 1) // 2, dtype=dtype)
        else:
            module = fastseq.RNN(inputs, hidden, layers, kind, dtype=dtype)
        wide = copy.deepcopy(module).double()
        draws = []
        # Judged together: in a few numbers the reference may be right by luck.
        for _ in range(max(8, 256 // (batch * hidden))):
            state = tuple(torch.randn(layers, batch, size, dtype=dtype) for size in module._state_sizes())
            draws.append((torch.randn(batch, inputs, dtype=dtype), state if len(state) > 1 else state[0]))
        wider = [torch.utils._pytree.tree_map(lambda value: value.double(), draw) for draw in draws]
        with torch.no_grad():
            with fastseq.testing.use_implementation("reference"):
                reference, truth = steps(module, draws), steps(wide, wider)
            for isa in fastseq.cpu.isas():
                with fastseq.cpu.use_isa(isa):
                    got = steps(module, draws)
                for name, *three in zip(("y", "h", "c"), got, reference, truth, strict=False):
                    comparison = fastseq.testing.compare_tensor(name, *three)
                    assert comparison.ok, (isa, batch, inputs, hidden, layers, comparison)
        assert module._packed is not None


def test_results_do_not_depend_on_the_number_of_threads(seed: int) -> None:
    module = fastseq.LSTM(96, 200, 2)
    threads = torch.get_num_threads()
    for batch in (1, 9):
        x, state = torch.randn(batch, 96), (torch.randn(2, batch, 200), torch.randn(2, batch, 200))
        results = []
        with torch.no_grad():
            try:
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(leaves(module.step(x, state)))
            finally:
                torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_what_comes_out_is_its_own_memory(seed: int) -> None:
    """Neither the state that went in nor another result changes when one is written to."""
    module = fastseq.LSTM(I, H)
    x, state = torch.randn(B, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    with torch.no_grad():
        module.step(x, state)
        before = [value.clone() for value in (x, *state)]
        y, (h, c) = module.step(x, state)
        assert len({value.untyped_storage().data_ptr() for value in (x, *state, y, h, c)}) == 6
    assert all(torch.equal(one, two) for one, two in zip(before, (x, *state), strict=True))


def test_weights_that_are_not_dense_are_never_packed(packs: list[int], seed: int) -> None:
    module = fastseq.LSTM(I, H)
    module.weight_ih_l0 = nn.Parameter(torch.randn(I, 4 * H).T)
    x = torch.randn(B, I)
    with torch.no_grad():
        torch.testing.assert_close(module.step(x)[0], module(x[None])[0][0])
    assert packs == []


def test_two_threads_step_one_module(seed: int) -> None:
    """Each with its own state, batch size and thread of Python; what they get is what one alone gets."""
    module = fastseq.LSTM(32, 96, 2)
    streams = [torch.randn(200, batch, 32) for batch in (1, 3)]
    with torch.no_grad():
        expected = [stream(module, x)[0] for x in streams]

    def alone(x: Tensor) -> Tensor:
        with torch.no_grad():
            return stream(module, x)[0]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        got = list(pool.map(alone, streams))
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_memory_does_not_grow(seed: int) -> None:
    """A thousand steps hold no more tensors than ten."""
    import gc

    module = fastseq.LSTM(I, H, L).eval()
    x = torch.randn(B, I)

    def alive(steps: int) -> int:
        state = None
        with torch.no_grad():
            for _ in range(steps):
                _, state = module.step(x, state)
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    first = alive(10)
    assert alive(1000) <= first


def test_refusals(seed: int) -> None:
    x = torch.randn(B, I)
    with pytest.raises(RuntimeError, match="step: a bidirectional layer reads from the end"):
        fastseq.LSTM(I, H, bidirectional=True).step(x)
    with pytest.raises(RuntimeError, match="one mask per sequence"):
        fastseq.RNN(I, H, recurrent_dropout=0.1).step(x)
    module = fastseq.LSTM(I, H)
    for bad, error, words in (
        (torch.randn(1, B, I), ValueError, r"x_t: expected shape \[B, I\] or \[I\], got \[1, 3, 4\]"),
        (torch.randn(B, I + 1), ValueError, "input_size. Expected 4, got 5"),
        ([1.0], TypeError, "x_t: expected a Tensor, got list"),
    ):
        with pytest.raises(error, match=words):
            module.step(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected hidden"):
        module.step(x, (torch.zeros(1, B + 1, H), torch.zeros(1, B, H)))
    with pytest.raises(ValueError, match="3-D"):
        module.step(x, (torch.zeros(B, H), torch.zeros(B, H)))
    with pytest.raises(TypeError, match="hx: expected a Tensor"):
        fastseq.RNN(I, H).step(x, (torch.zeros(1, B, H),))  # type: ignore[arg-type]
