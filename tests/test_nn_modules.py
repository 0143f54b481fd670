"""fastseq.LSTM, RNN, LSTMCell and RNNCell as drop-ins: constructor, state, layouts, options, errors, compilation."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from nn_support import TWINS, Draw, assert_close, assert_same, assert_twins_agree, run, tensors, twins, uniform
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastseq
from fastseq.nn import vendor

LAYERS = (nn.LSTM, nn.RNN)
CELLS = (nn.LSTMCell, nn.RNNCell)
name_of = lambda cls: cls.__name__  # noqa: E731


@pytest.fixture(autouse=True)
def from_one_seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.config.getoption("--seed") or 0)


def states_for(module: Any, batch: int | None, dtype: torch.dtype) -> Any:
    """Random initial states for a layer, in the module's own form; batch None: without a batch axis."""
    stacked = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size]
    made = []
    for size in sizes if module.mode == "LSTM" else sizes[1:]:
        shape = (stacked, size) if batch is None else (stacked, batch, size)
        made.append(uniform(*shape, dtype=dtype))
    return tuple(made) if module.mode == "LSTM" else made[0]


def test_the_public_names() -> None:
    expected = {"LSTM", "RNN", "LSTMCell", "RNNCell", "ShapeError", "convert", "to_torch", "patch", "info"}
    expected |= {"functional", "reference", "testing", "__version__", "States", "RNNStates"}
    expected |= {"diagnostics", "init", "models"}
    assert set(fastseq.__all__) == expected
    assert all(hasattr(fastseq, name) for name in expected)


# Construction and state


CONSTRUCTIONS: list[tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = [
    (nn.LSTM, (3, 5), {}),
    (nn.LSTM, (3, 5, 2, False, True, 0.25, True, 2), {}),
    (nn.LSTM, (3, 5, 3), {"bidirectional": True, "dtype": torch.float64}),
    (nn.LSTM, (3, 5), {"proj_size": 2, "bias": False}),
    (nn.RNN, (3, 5), {}),
    (nn.RNN, (3, 5, 2, "relu", False, True, 0.25, True), {}),
    (nn.RNN, (3, 5), {"num_layers": 3, "nonlinearity": "relu", "bidirectional": True, "dtype": torch.float16}),
    (nn.LSTMCell, (3, 5), {}),
    (nn.LSTMCell, (3, 5, False), {"dtype": torch.float64}),
    (nn.RNNCell, (3, 5), {}),
    (nn.RNNCell, (3, 5, True, "relu"), {}),
    (nn.RNNCell, (3, 5), {"bias": False, "nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("torch_class", "args", "kwargs"), CONSTRUCTIONS)
def test_construction_is_that_of_torch(torch_class: type[nn.Module], args: Any, kwargs: Any) -> None:
    """Parameters by name, order, value and dtype; the state of the generator after; repr; attributes."""
    generator_states, made = [], []
    for cls in (torch_class, TWINS[torch_class]):
        torch.manual_seed(3)
        made.append(cls(*args, **kwargs))
        generator_states.append(torch.get_rng_state())
    theirs, ours = made
    assert torch.equal(*generator_states)
    assert not isinstance(ours, torch_class)
    for (name, one), (other_name, other) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert other.requires_grad
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    public = [name for name in vars(theirs) if not name.startswith("_")]
    assert {name: getattr(ours, name) for name in public} == {name: getattr(theirs, name) for name in public}
    if torch_class in LAYERS:
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert ours._all_weights == theirs._all_weights
        assert [[id(weight) for weight in layer] for layer in ours.all_weights] == [
            [id(getattr(ours, name)) for name in names] for names in theirs._all_weights
        ]
        assert [id(weight) for weight in ours._flat_weights] == [id(weight) for weight in ours.parameters()]
        assert ours.flatten_parameters() is None


@pytest.mark.parametrize(("torch_class", "args", "kwargs"), CONSTRUCTIONS)
def test_state_dicts_go_both_ways(torch_class: type[nn.Module], args: Any, kwargs: Any) -> None:
    theirs, ours = torch_class(*args, **kwargs), TWINS[torch_class](*args, **kwargs)
    for source, target in ((theirs, ours), (ours, theirs)):
        source.reset_parameters()
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(one, other) for one, other in zip(source.parameters(), target.parameters(), strict=True))


def test_an_rnn_inside_a_larger_model_loads_a_torch_checkpoint() -> None:
    def model(lstm: type[nn.Module]) -> nn.Module:
        return nn.ModuleDict({"embed": nn.Embedding(7, 3), "lstm": lstm(3, 4, 2), "out": nn.Linear(4, 7)})

    theirs, ours = model(nn.LSTM), model(fastseq.LSTM)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    assert ours.load_state_dict(torch.load(file)) == nn.modules.module._IncompatibleKeys([], [])


@pytest.mark.parametrize("torch_class", TWINS, ids=name_of)
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy", "copy"])
def test_copies_compute_the_same(torch_class: type[nn.Module], way: str) -> None:
    module = TWINS[torch_class](3, 4).eval()
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = getattr(copy, way)(module)
    x = torch.randn(5, 3)
    assert type(twin) is type(module)
    assert not twin.training
    assert repr(twin) == repr(module)
    assert all(torch.equal(one, other) for one, other in zip(tensors(module(x)), tensors(twin(x)), strict=True))
    shared = [one is other for one, other in zip(module.parameters(), twin.parameters(), strict=True)]
    assert all(shared) if way == "copy" else not any(shared)


def test_a_copy_follows_its_own_weights() -> None:
    module = fastseq.LSTM(3, 4)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert not torch.equal(module(torch.ones(2, 3))[0], twin(torch.ones(2, 3))[0])
    assert twin(torch.ones(2, 3))[0].abs().max() == 0


def test_setstate_takes_the_state_of_a_torch_module() -> None:
    theirs = nn.LSTM(3, 4, 2, dtype=torch.float64)
    ours = fastseq.LSTM.__new__(fastseq.LSTM)
    ours.__setstate__(theirs.__getstate__())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_same(ours(x), theirs(x))
    state = theirs.__getstate__()
    del state["proj_size"]  # as pickled by a torch older than projections
    older = fastseq.LSTM.__new__(fastseq.LSTM)
    older.__setstate__(state)
    assert older.proj_size == 0


def test_moves_casts_and_freezing() -> None:
    module = fastseq.LSTM(3, 4).double()
    assert module(torch.randn(5, 2, 3, dtype=torch.float64))[0].dtype == torch.float64
    assert {weight.device.type for weight in module.to("meta").parameters()} == {"meta"}
    module = fastseq.LSTM(3, 4, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    module.requires_grad_(False)
    assert not module(torch.randn(5, 2, 3))[0].requires_grad
    module.weight_hh_l0.requires_grad_(True)
    output, _ = module(torch.randn(5, 2, 3))
    output.sum().backward()
    assert [name for name, weight in module.named_parameters() if weight.grad is not None] == ["weight_hh_l0"]


def test_on_meta_tensors_only_shapes_are_computed() -> None:
    module = fastseq.LSTM(3, 4, 2, bidirectional=True, proj_size=2, device="meta")
    output, (h_n, c_n) = module(torch.empty(5, 6, 3, device="meta"))
    assert output.device.type == "meta"
    assert (output.shape, h_n.shape, c_n.shape) == ((5, 6, 4), (4, 6, 2), (4, 6, 4))


def test_a_replaced_parameter_is_used() -> None:
    module = fastseq.RNN(3, 4)
    x = torch.randn(5, 2, 3)
    before = module(x)[0]
    module.weight_hh_l0 = nn.Parameter(torch.zeros(4, 4))
    assert not torch.equal(before, module(x)[0])
    values = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    assert torch.func.functional_call(module, values, (x,))[0].abs().max() == 0


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0, 4), {}),
        ((-1, 4), {}),
        ((3, 0), {}),
        ((3, 4, 0), {}),
        ((3.0, 4), {}),
        (("3", 4), {}),
        ((3, 4.0), {}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"bias": None}),
        ((3, 4), {"batch_first": 0}),
        ((3, 4, 2), {"dropout": 1.5}),
        ((3, 4, 2), {"dropout": -0.1}),
        ((3, 4, 2), {"dropout": True}),
        ((3, 4, 2), {"dropout": "half"}),
        ((3, 4, 2), {"dropout": None}),
        ((3, 4), {"proj_size": 4}),
        ((3, 4), {"proj_size": -1}),
        ((3, 4), {"no_such_argument": 1}),
    ],
)
def test_bad_constructor_arguments(torch_class: type[nn.Module], args: Any, kwargs: Any) -> None:
    """The same type of error and the same words as torch's."""
    caught = []
    for cls in (torch_class, TWINS[torch_class]):
        with pytest.raises((TypeError, ValueError)) as error:
            cls(*args, **kwargs)
        caught.append(error.value)
    assert type(caught[1]) is type(caught[0])
    if "no_such_argument" not in kwargs:
        assert str(caught[1]) == str(caught[0])


def test_unknown_nonlinearities() -> None:
    with pytest.raises(ValueError, match=r"Unknown nonlinearity 'elu'\. Select from 'tanh', 'relu' or 'sigmoid'"):
        fastseq.RNN(3, 4, nonlinearity="elu")
    for cls in (nn.RNNCell, fastseq.RNNCell):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: elu"):
            cls(3, 4, nonlinearity="elu")(torch.zeros(2, 3))


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_dropout_with_one_layer_warns_at_the_call(torch_class: type[nn.Module]) -> None:
    messages = []
    for cls in (torch_class, TWINS[torch_class]):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as caught:
            cls(3, 4, dropout=0.5)
        messages.append(str(caught[0].message))
    assert messages[0] == messages[1]
    assert caught[0].filename == __file__


def test_sigmoid_shows_in_repr() -> None:
    assert repr(fastseq.RNN(3, 4, nonlinearity="sigmoid")) == "RNN(3, 4, nonlinearity=sigmoid)"
    assert repr(fastseq.RNNCell(3, 4, nonlinearity="sigmoid")) == "RNNCell(3, 4, nonlinearity=sigmoid)"


# Results against torch's


LAYER_OPTIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "bidirectional": True, "bias": False},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    {"proj_size": 1, "batch_first": True, "bias": False},
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=str)
@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_layers_agree_with_torch(torch_class: type[nn.Module], options: dict[str, Any], dtype: torch.dtype) -> None:
    if torch_class is nn.RNN:
        options = {key: value for key, value in options.items() if key != "proj_size"}

    def draw(with_states: bool) -> Draw:
        theirs, ours = twins(torch_class, 3, 5, **options, dtype=dtype)
        x = uniform(4, 7, 3, dtype=dtype)
        return theirs, ours, (x, states_for(ours, 4 if ours.batch_first else 7, dtype)) if with_states else (x,)

    for with_states in (False, True):
        assert_twins_agree(partial(draw, with_states), dtype)


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input(torch_class: type[nn.Module], batch_first: bool) -> None:
    def draw(with_states: bool) -> Draw:
        theirs, ours = twins(torch_class, 3, 5, 2, batch_first=batch_first, bidirectional=True, dtype=torch.float64)
        x = uniform(6, 3)
        return theirs, ours, (x, states_for(ours, None, torch.float64)) if with_states else (x,)

    for with_states in (False, True):
        assert_twins_agree(partial(draw, with_states), torch.float64)


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
@pytest.mark.parametrize("batch_first", [False, True])
def test_layouts_and_strides_of_the_results(torch_class: type[nn.Module], batch_first: bool) -> None:
    theirs, ours = twins(torch_class, 3, 5, 2, batch_first=batch_first, bidirectional=True)
    x = torch.randn(4, 7, 3)
    for one, other in zip(tensors(ours(x)), tensors(theirs(x)), strict=True):
        assert one.shape == other.shape
        assert one.stride() == other.stride()


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_strided_input_and_an_empty_batch(torch_class: type[nn.Module]) -> None:
    def draw() -> Draw:
        x = uniform(3, 8, 5, 2)[..., 0].permute(2, 1, 0)[:, ::2]
        assert not x.is_contiguous()
        return *twins(torch_class, 3, 5, dtype=torch.float64), (x,)

    assert_twins_agree(draw, torch.float64)
    theirs, ours = twins(torch_class, 3, 5, dtype=torch.float64)
    empty = torch.randn(5, 0, 3, dtype=torch.float64)
    for one, other in zip(tensors(ours(empty)), tensors(theirs(empty)), strict=True):
        assert one.shape == other.shape


def test_hx_may_be_a_list_and_its_batch_may_be_expanded() -> None:
    theirs, ours = twins(nn.LSTM, 3, 5, dtype=torch.float64)
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    hx = [torch.randn(1, 1, 5, dtype=torch.float64).expand(1, 7, 5) for _ in range(2)]
    assert_same(ours(x, hx)[0], theirs(x, hx)[0])


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
@pytest.mark.parametrize("used", ["output", "h_n", "last"])
def test_unused_results_receive_no_gradient(torch_class: type[nn.Module], used: str) -> None:
    def draw() -> Draw:
        theirs, ours = twins(torch_class, 3, 5, 2, bidirectional=True, dtype=torch.float64)
        x = uniform(4, 7, 3)
        return theirs, ours, (x, states_for(ours, 7, torch.float64))

    def part(module: nn.Module, *args: Any) -> Tensor:
        output, states = module(*args)
        states = states if isinstance(states, tuple) else (states,)
        parts: dict[str, Tensor] = {"output": output, "h_n": states[0], "last": states[-1][-1]}
        return parts[used]

    assert_twins_agree(draw, torch.float64, their_call=part, our_call=part)


# Dropout


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_dropout_draws_torchs_masks(torch_class: type[nn.Module]) -> None:
    options = {"dropout": 0.4, "bidirectional": True, "batch_first": True, "dtype": torch.float64}

    def draw(packed: bool) -> Draw:
        x: Any = uniform(4, 7, 3)
        if packed:
            x = pack_padded_sequence(x, torch.tensor([3, 7, 1, 5]), batch_first=True, enforce_sorted=False)
        return *twins(torch_class, 3, 5, 3, **options), (x,)

    for packed in (False, True):
        assert_twins_agree(partial(draw, packed), torch.float64)


def test_dropout_statistics_seed_and_eval() -> None:
    module = fastseq.RNN(2, 200, 2, dropout=0.3, nonlinearity="relu")
    with torch.no_grad():
        # A second layer that hands on what it gets: y is then the dropped-out output of the first.
        module.weight_ih_l1.copy_(torch.eye(200))
        for name in ("weight_hh_l1", "bias_ih_l1", "bias_hh_l1", "weight_hh_l0", "weight_ih_l0", "bias_hh_l0"):
            getattr(module, name).zero_()
        module.bias_ih_l0.fill_(1.0)
    x = torch.zeros(50, 20, 2)
    torch.manual_seed(0)
    first, _ = module(x)
    torch.manual_seed(0)
    again, _ = module(x)
    other, _ = module(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((first == 0).double().mean() - 0.3) < 5 * (0.3 * 0.7 / first.numel()) ** 0.5
    assert torch.equal(module.eval()(x)[0], torch.ones(50, 20, 200))
    certain = fastseq.RNN(2, 4, 2, dropout=1.0, bias=False)
    assert certain(torch.randn(3, 2, 2))[0].abs().max() == 0


# PackedSequence


def packed_input(kind: str, dtype: torch.dtype = torch.float64) -> PackedSequence:
    if kind == "sorted":
        packed = pack_sequence([uniform(n, 3, dtype=dtype) for n in (6, 4, 4, 1)])
    elif kind == "unsorted":
        packed = pack_sequence([uniform(n, 3, dtype=dtype) for n in (2, 6, 1, 4)], enforce_sorted=False)
    elif kind == "equal":
        packed = pack_sequence([uniform(5, 3, dtype=dtype) for _ in range(3)])
    else:
        packed = pack_sequence([uniform(4, 3, dtype=dtype)])
    return packed


@pytest.mark.parametrize("kind", ["sorted", "unsorted", "equal", "single"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_packed_sequences(torch_class: type[nn.Module], options: dict[str, Any], kind: str) -> None:
    def draw(with_states: bool) -> Draw:
        theirs, ours = twins(torch_class, 3, 5, **options, dtype=torch.float64)
        packed = packed_input(kind)
        states = states_for(ours, int(packed.batch_sizes[0]), torch.float64)
        return theirs, ours, (packed, states) if with_states else (packed,)

    for with_states in (False, True):
        assert_twins_agree(partial(draw, with_states), torch.float64)
    _, ours, (packed,) = draw(False)
    output = ours(packed)[0]
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    assert output.sorted_indices is packed.sorted_indices
    assert output.unsorted_indices is packed.unsorted_indices


def test_packed_sequences_with_projection_and_in_float32() -> None:
    def draw() -> Draw:
        return *twins(nn.LSTM, 3, 5, 2, bidirectional=True, proj_size=2), (packed_input("unsorted", torch.float32),)

    assert_twins_agree(draw, torch.float32)


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_a_packed_sequence_of_which_only_some_results_are_used(torch_class: type[nn.Module]) -> None:
    """h_n alone, and one sequence's last valid output alone: no gradient arrives for the rest."""

    def draw() -> Draw:
        return *twins(torch_class, 3, 5, bidirectional=True, dtype=torch.float64), (packed_input("unsorted"),)

    def h_n(module: nn.Module, packed: PackedSequence) -> Tensor:
        return tensors(module(packed)[1])[0]

    def last_output(module: nn.Module, packed: PackedSequence) -> Tensor:
        return pad_packed_sequence(module(packed)[0])[0][1, 0]

    for call in (h_n, last_output):
        assert_twins_agree(draw, torch.float64, their_call=call, our_call=call)


# lengths and reset


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_lengths_are_a_packed_sequence_without_packing(torch_class: type[nn.Module], batch_first: bool) -> None:
    lengths = torch.tensor([2, 6, 1, 4])

    def draw() -> Draw:
        theirs, ours = twins(torch_class, 3, 5, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
        x = uniform(*((4, 6, 3) if batch_first else (6, 4, 3)))
        return theirs, ours, (x, states_for(ours, 4, torch.float64))

    def by_packing(module: nn.Module, x: Tensor, hx: Any) -> Any:
        packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
        output, states = module(packed, hx)
        return pad_packed_sequence(output, batch_first=batch_first)[0], states

    def by_lengths(module: nn.Module, x: Tensor, hx: Any) -> Any:
        return module(x, hx, lengths=lengths)

    assert_twins_agree(draw, torch.float64, their_call=by_packing, our_call=by_lengths)


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_a_length_of_zero_hands_on_the_state(torch_class: type[nn.Module]) -> None:
    ours = TWINS[torch_class](3, 5, dtype=torch.float64)
    x, hx = torch.randn(6, 2, 3, dtype=torch.float64), states_for(ours, 2, torch.float64)
    output, last = ours(x, hx, lengths=torch.tensor([0, 6], dtype=torch.int32))
    assert output[:, 0].abs().max() == 0
    for final, initial in zip(tensors(last), tensors(hx), strict=True):
        assert torch.equal(final[:, 0], initial[:, 0])
    alone = ours(x[:, 1:], hx=tuple(h[:, 1:] for h in hx) if isinstance(hx, tuple) else hx[:, 1:])
    assert_same(output[:, 1:], alone[0])


@pytest.mark.parametrize("nonlinearity", [None, "tanh", "sigmoid"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_are_separate_episodes(nonlinearity: str | None, batch_first: bool) -> None:
    """A reset at t is a new call from zeros, in both directions: one layer, so that the episodes can be run apart."""
    options = {"bidirectional": True, "batch_first": batch_first, "dtype": torch.float64}
    ours: Any = (
        fastseq.RNN(3, 5, nonlinearity=nonlinearity, **options) if nonlinearity else fastseq.LSTM(3, 5, **options)
    )
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[3, 0] = reset[4, 0] = True
    reset[2, 1] = True
    turned = (lambda value: value.transpose(0, 1)) if batch_first else (lambda value: value)
    output, states = ours(turned(x), reset=turned(reset))
    output = turned(output)
    for column, cuts in ((0, (0, 3, 4, 7)), (1, (0, 2, 7))):
        for start, end in itertools.pairwise(cuts):
            apart, last = ours(x[start:end, column])
            assert_same(output[start:end, column], apart)
            for final, of_episode in zip(tensors(states), tensors(last), strict=True):
                if end == 7:  # the forward direction ends in the last episode, the reverse in the first
                    assert_same(final[0, column], of_episode[0])
                if start == 0:
                    assert_same(final[1, column], of_episode[1])


def test_no_gradient_crosses_a_reset() -> None:
    ours = fastseq.LSTM(3, 5, 2, bidirectional=True)
    x = torch.randn(6, 1, 3, requires_grad=True)
    reset = torch.zeros(6, 1, dtype=torch.bool)
    reset[4] = True
    (grad,) = torch.autograd.grad(ours(x, reset=reset)[0][:4].sum(), x)
    assert grad[:4].abs().min() > 0
    assert grad[4:].abs().max() == 0


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_lengths_and_reset_without_a_batch(torch_class: type[nn.Module]) -> None:
    ours = TWINS[torch_class](3, 5, 2, batch_first=True)
    x = torch.randn(6, 3)
    reset = torch.tensor([False, False, True, False, False, False])
    lengths = torch.tensor(5)
    single = tensors(ours(x, lengths=lengths, reset=reset))
    batch = tensors(ours(x[None], lengths=lengths[None], reset=reset[None]))
    assert torch.equal(single[0], batch[0][0])
    assert all(torch.equal(one, other[:, 0]) for one, other in zip(single[1:], batch[1:], strict=True))


def test_reset_beside_a_packed_sequence_is_in_the_callers_order() -> None:
    ours = fastseq.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 1, 4])
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    reset = torch.rand(6, 4) < 0.3
    padded, states = ours(x, lengths=lengths, reset=reset)
    packed, packed_states = ours(pack_padded_sequence(x, lengths, enforce_sorted=False), reset=reset)
    assert_same(pad_packed_sequence(packed)[0], padded)
    for one, other in zip(packed_states, states, strict=True):
        assert_same(one, other)


# Cells


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("torch_class", CELLS, ids=name_of)
def test_cells_agree_with_torch(torch_class: type[nn.Module], bias: bool, dtype: torch.dtype) -> None:
    def draw(kind: str) -> Draw:
        theirs, ours = twins(torch_class, 3, 5, bias, dtype=dtype)
        x, h, c = (uniform(4, size, dtype=dtype) for size in (3, 5, 5))
        if kind == "unbatched":
            return theirs, ours, (x[0].detach().requires_grad_(),)
        states = (h, c) if torch_class is nn.LSTMCell else h
        return theirs, ours, (x, states) if kind == "with states" else (x,)

    for kind in ("plain", "with states", "unbatched"):
        assert_twins_agree(partial(draw, kind), dtype)
    _, ours = twins(torch_class, 3, 5, bias, dtype=dtype)
    assert tensors(ours(torch.zeros(0, 3, dtype=dtype)))[0].shape == (0, 5)


def test_a_cell_in_a_loop_is_the_layer() -> None:
    layer, cell = fastseq.LSTM(3, 5, dtype=torch.float64), fastseq.LSTMCell(3, 5, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    state = None
    for x_t, expected in zip(x, layer(x)[0], strict=True):
        state = cell(x_t, state)
        assert_same(state[0], expected)


def test_a_sigmoid_cell() -> None:
    cell = fastseq.RNNCell(3, 5, nonlinearity="sigmoid", dtype=torch.float64)
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    z = nn.functional.linear(x, cell.weight_ih, cell.bias_ih) + nn.functional.linear(h, cell.weight_hh, cell.bias_hh)
    assert_same(cell(x, h), z.sigmoid())


# Errors of forward


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


LAYER_ERRORS: list[tuple[str, Any]] = [
    ("1-D input", lambda hx: (zeros(3),)),
    ("4-D input", lambda hx: (zeros(2, 2, 2, 3),)),
    ("wrong features", lambda hx: (zeros(5, 2, 4),)),
    ("wrong features without a batch", lambda hx: (zeros(5, 4),)),
    ("wrong dtype", lambda hx: (zeros(5, 2, 3, dtype=torch.float64),)),
    ("an integer input", lambda hx: (zeros(5, 2, 3, dtype=torch.int64),)),
    ("an empty time axis", lambda hx: (zeros(0, 2, 3),)),
    ("an empty time axis without a batch", lambda hx: (zeros(0, 3),)),
    ("2-D hx of a batch", lambda hx: (zeros(5, 2, 3), hx(1, 4))),
    ("3-D hx without a batch", lambda hx: (zeros(5, 3), hx(1, 1, 4))),
    ("hx of another batch size", lambda hx: (zeros(5, 2, 3), hx(1, 3, 4))),
    ("hx of too many layers", lambda hx: (zeros(5, 2, 3), hx(2, 2, 4))),
    ("hx of another size", lambda hx: (zeros(5, 2, 3), hx(1, 2, 5))),
    ("hx of another size without a batch", lambda hx: (zeros(5, 3), hx(1, 5))),
    ("hx on another device", lambda hx: (zeros(5, 2, 3), hx(1, 2, 4, device="meta"))),
    ("input on another device", lambda hx: (zeros(5, 2, 3, device="meta"),)),
]
# torch's LSTM does not check a packed input: wrong features go unnoticed there, or fail in a kernel's own words.
PACKED_ERRORS: list[tuple[str, Any]] = [
    ("packed: wrong features", lambda hx: (pack_sequence([zeros(5, 4)]),)),
    ("packed: wrong dtype", lambda hx: (pack_sequence([zeros(5, 3, dtype=torch.float64)]),)),
    ("packed: one dimension too many", lambda hx: (pack_sequence([zeros(5, 3, 3)]),)),
    ("packed: hx of another batch size", lambda hx: (pack_sequence([zeros(5, 3), zeros(2, 3)]), hx(1, 1, 4))),
]


@pytest.mark.parametrize(
    ("torch_class", "make"),
    [pytest.param(nn.LSTM, make, id=f"LSTM: {name}") for name, make in LAYER_ERRORS]
    + [pytest.param(nn.RNN, make, id=f"RNN: {name}") for name, make in LAYER_ERRORS + PACKED_ERRORS],
)
def test_bad_arguments_of_a_layer_raise_torchs_words(torch_class: type[nn.Module], make: Any) -> None:
    def hx(*shape: int, **options: Any) -> Any:
        value = torch.zeros(shape, **options)
        return (value, value) if torch_class is nn.LSTM else value

    caught = []
    for module in twins(torch_class, 3, 4):
        with pytest.raises((ValueError, RuntimeError)) as error:
            module(*make(hx))
        caught.append(error.value)
    theirs, ours = caught
    assert isinstance(ours, fastseq.ShapeError)
    assert isinstance(ours, type(theirs))
    assert str(ours).startswith(str(theirs).split("\n")[0])


@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_bad_states_that_torch_reports_from_inside(torch_class: type[nn.Module]) -> None:
    """torch raises RuntimeError here too, from a kernel and in its own terms; ours names the argument."""
    ours = TWINS[torch_class](3, 4)
    wrong = zeros(1, 2, 4, dtype=torch.float64)
    hx = (wrong, wrong) if torch_class is nn.LSTM else wrong
    with pytest.raises(fastseq.ShapeError, match=r"input tensor of torch\.float32 and hidden.* of torch\.float64"):
        ours(zeros(5, 2, 3), hx)


@pytest.mark.parametrize("make", [make for _, make in PACKED_ERRORS], ids=[name for name, _ in PACKED_ERRORS])
def test_the_lstm_checks_packed_input_in_the_words_of_the_rnn(make: Any) -> None:
    with pytest.raises(fastseq.ShapeError) as from_rnn:
        fastseq.RNN(3, 4)(*make(zeros))
    with pytest.raises(fastseq.ShapeError) as from_lstm:
        fastseq.LSTM(3, 4)(*make(lambda *shape: (zeros(*shape), zeros(*shape))))
    assert str(from_lstm.value).replace("hidden[0]", "hidden") == str(from_rnn.value)


def test_states_that_are_no_pair() -> None:
    ours, x = fastseq.LSTM(3, 4), zeros(5, 2, 3)
    with pytest.raises(fastseq.ShapeError, match=r"lstm expects two hidden states, hx = \(h_0, c_0\), got 3"):
        ours(x, (zeros(1, 2, 4),) * 3)
    with pytest.raises(fastseq.ShapeError, match=r"hx: expected a tuple \(h_0, c_0\), got one tensor"):
        ours(x, zeros(2, 2, 4))
    with pytest.raises(TypeError, match=r"hx: expected a tuple \(h_0, c_0\) of tensors, got int"):
        ours(x, 1)
    with pytest.raises(TypeError, match="hx: expected a Tensor, got tuple"):
        fastseq.RNN(3, 4)(x, (zeros(1, 2, 4),))
    with pytest.raises(TypeError, match="input: expected a Tensor or a PackedSequence, got list"):
        ours([1, 2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": zeros(3, dtype=torch.int64)}, ValueError, r"lengths: expected shape \[B\] = \[2\], got \[3\]"),
        ({"lengths": zeros(2)}, TypeError, "lengths: expected an integer dtype"),
        ({"lengths": [5, 4]}, TypeError, "lengths: expected a Tensor, got list"),
        ({"lengths": torch.tensor([5, -1])}, ValueError, "lengths: expected values from 0 to T = 5, got -1"),
        ({"lengths": torch.tensor([5, 6])}, ValueError, "lengths: expected values from 0 to T = 5, got 6"),
        ({"reset": zeros(5, 2)}, TypeError, "reset: expected dtype torch.bool"),
        (
            {"reset": zeros(2, 5, dtype=torch.bool)},
            ValueError,
            r"reset: expected shape \[T, B\] = \[5, 2\], got \[2, 5\]",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("torch_class", LAYERS, ids=name_of)
def test_bad_lengths_and_resets(torch_class: type[nn.Module], options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        TWINS[torch_class](3, 4)(zeros(5, 2, 3), **options)


def test_bad_lengths_and_resets_are_reported_in_the_callers_layout() -> None:
    with pytest.raises(ValueError, match=r"reset: expected shape \[B, T\] = \[2, 5\], got \[5, 2\]"):
        fastseq.LSTM(3, 4, batch_first=True)(zeros(2, 5, 3), reset=zeros(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"reset: expected shape \[T\] = \[5\], got \[5, 1\]"):
        fastseq.LSTM(3, 4)(zeros(5, 3), reset=zeros(5, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"lengths: expected shape \[\] = \[\], got \[1\]"):
        fastseq.LSTM(3, 4)(zeros(5, 3), lengths=torch.tensor([4]))
    with pytest.raises(TypeError, match="lengths: expected None beside a PackedSequence"):
        fastseq.LSTM(3, 4)(pack_sequence([zeros(5, 3)]), lengths=torch.tensor([4]))


CELL_ERRORS: list[tuple[str, Any]] = [
    ("3-D input", lambda hx: (zeros(2, 2, 3),)),
    ("3-D hx", lambda hx: (zeros(2, 3), hx(1, 2, 4))),
    ("wrong features", lambda hx: (zeros(2, 5),)),
    ("hx of another batch size", lambda hx: (zeros(2, 3), hx(3, 4))),
    ("hx of another size", lambda hx: (zeros(2, 3), hx(2, 5))),
    ("1-D hx of a batch", lambda hx: (zeros(2, 3), hx(4))),
    ("2-D hx without a batch", lambda hx: (zeros(3), hx(1, 4))),
]


@pytest.mark.parametrize("make", [make for _, make in CELL_ERRORS], ids=[name for name, _ in CELL_ERRORS])
@pytest.mark.parametrize("torch_class", CELLS, ids=name_of)
def test_bad_arguments_of_a_cell_raise_torchs_words(torch_class: type[nn.Module], make: Any) -> None:
    def hx(*shape: int) -> Any:
        value = torch.zeros(shape)
        return (value, value) if torch_class is nn.LSTMCell else value

    caught = []
    for cell in twins(torch_class, 3, 4):
        with pytest.raises((ValueError, RuntimeError)) as error:
            cell(*make(hx))
        caught.append(error.value)
    theirs, ours = caught
    assert isinstance(ours, fastseq.ShapeError)
    assert isinstance(ours, type(theirs))
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("torch_class", CELLS, ids=name_of)
def test_bad_dtype_and_device_of_a_cell(torch_class: type[nn.Module]) -> None:
    for cell in twins(torch_class, 3, 4):
        for x in (zeros(2, 3, dtype=torch.float64), zeros(2, 3, dtype=torch.int64), zeros(2, 3, device="meta")):
            with pytest.raises(RuntimeError, match=r"dtype|device"):
                cell(x)
    with pytest.raises(TypeError, match=r"hx: expected a tuple \(h_0, c_0\), got Tensor"):
        fastseq.LSTMCell(3, 4)(zeros(2, 3), zeros(2, 2, 4))
    with pytest.raises(fastseq.ShapeError, match="two hidden states"):
        fastseq.LSTMCell(3, 4)(zeros(2, 3), (zeros(2, 4),))
    with pytest.raises(TypeError, match="input: expected a Tensor, got list"):
        fastseq.RNNCell(3, 4)([1.0])


# Half types, autocast, compilation


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("torch_class", TWINS, ids=name_of)
def test_autocast_gives_torchs_dtypes(torch_class: type[nn.Module], given: torch.dtype) -> None:
    """The results too: they are held to the rule by the reference, and rounded to bfloat16 by torch's own."""
    got, ref, peer, truth = [], [], [], []
    for _ in range(8):
        theirs, ours = twins(torch_class, 3, 4)
        x = uniform(*((5, 2, 3) if torch_class in LAYERS else (2, 3)), dtype=given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            peer.append(tensors(theirs(x)))
            got.append(tensors(ours(x)))
            with fastseq.testing.use_implementation("reference"):
                ref.append(tensors(ours(x)))
        truth.append(tensors(theirs.double()(x.double())))
    for index in range(len(truth[0])):
        one, other, yardstick, exact = (
            torch.stack([each[index].detach() for each in side]) for side in (got, peer, ref, truth)
        )
        assert one.dtype == other.dtype
        assert_close(f"output {index}", one, yardstick, exact)
        assert_close(f"output {index}, by torch", one.bfloat16(), other.bfloat16(), exact)


def test_autocast_has_gradients() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastseq.LSTM(3, 4)(torch.randn(5, 2, 3))[0].float().sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("torch_class", TWINS, ids=name_of)
def test_compiles_without_a_graph_break(torch_class: type[nn.Module], backend: str) -> None:
    torch._dynamo.reset()
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True} if torch_class in LAYERS else {}
    ours = TWINS[torch_class](3, 4, **options, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    x = torch.randn((2, 5, 3) if torch_class in LAYERS else (5, 3), dtype=torch.float64, requires_grad=True)
    eager = run(ours, (x,))
    assert_same(list(run(ours, (x,), lambda _, x: compiled(x)).values()), list(eager.values()))
    if torch_class in LAYERS:
        lengths, reset = torch.tensor([3, 5]), torch.rand(2, 5) < 0.3
        assert_same(compiled(x, lengths=lengths, reset=reset), ours(x, lengths=lengths, reset=reset))


def test_exports_with_dynamic_time_and_batch() -> None:
    ours = fastseq.LSTM(3, 4, 2, bidirectional=True, batch_first=True, dtype=torch.float64).eval()
    dynamic = {"input": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}}
    program = torch.export.export(
        ours, (torch.randn(2, 5, 3, dtype=torch.float64),), dynamic_shapes=dynamic, strict=False
    )
    for batch, steps in ((3, 7), (6, 4)):
        x = torch.randn(batch, steps, 3, dtype=torch.float64)
        assert_same(program.module()(x), ours(x))


def test_ensembles_and_per_sample_gradients() -> None:
    models = [fastseq.LSTM(3, 4, dtype=torch.float64) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def output(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (params, buffers), (x,))[0]

    together = torch.func.vmap(output, in_dims=(0, 0, None))(params, buffers, x)
    assert_same(together, torch.stack([model(x)[0] for model in models]))

    own = dict(models[0].named_parameters())

    def loss(params: Any, x: Tensor) -> Tensor:
        return output(params, {}, x).square().sum()

    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(own, x)
    for b in range(2):
        expected = torch.autograd.grad(loss(own, x[:, b]), list(own.values()))
        for got, truth in zip(samples.values(), expected, strict=True):
            assert_same(got[b], truth)


def test_compiles_with_dynamic_shapes_without_recompiling() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    ours = fastseq.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    compiled(torch.randn(5, 2, 3, dtype=torch.float64))
    first = len(counter.graphs)
    for steps, batch in ((9, 3), (100, 4)):
        x = torch.randn(steps, batch, 3, dtype=torch.float64)
        assert_same(compiled(x), ours(x))
    assert len(counter.graphs) == first


def test_compiles_around_a_packed_sequence() -> None:
    torch._dynamo.reset()
    ours = fastseq.LSTM(3, 4, dtype=torch.float64)
    packed = packed_input("unsorted")
    output, states = torch.compile(ours, backend="aot_eager")(packed)
    expected, expected_states = ours(packed)
    assert_same((output, states), (expected, expected_states))


@pytest.mark.parametrize("torch_class", TWINS, ids=name_of)
def test_torchs_own_path_is_wired_rightly(torch_class: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves CUDA tensors, sent CPU tensors: bit for bit torch's results, dropout included."""
    kept = vendor.serves

    def serves(x: Tensor, mode: str, lengths: Tensor | None = None, reset: Tensor | None = None) -> bool:
        assert not kept(x, mode, lengths, reset)  # a CPU tensor
        return lengths is None and reset is None and mode in vendor._LAYERS

    monkeypatch.setattr(vendor, "serves", serves)
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}
    theirs, ours = twins(torch_class, 3, 4, **(options if torch_class in LAYERS else {}))
    inputs = [torch.randn(2, 5, 3), torch.randn(5, 3), packed_input("unsorted", torch.float32)]
    for x in inputs if torch_class in LAYERS else inputs[1:2]:
        results = []
        for module in (theirs, ours):
            torch.manual_seed(0)
            results.append(tensors(module(x)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_importing_and_calling_a_plain_layer_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastseq.LSTM(3, 4, 2, dropout=0.1)(torch.randn(5, 2, 3))[0].sum().backward()
