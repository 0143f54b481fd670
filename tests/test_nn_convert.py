"""fastseq.convert, to_torch and patch: what is swapped, what is shared, what is left alone."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nn_support import TWINS, assert_same, tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastseq
from fastseq.nn import convert as conversion

MAKERS: dict[str, Any] = {
    "LSTM": lambda: nn.LSTM(3, 4, 2, True, True, 0.2, True, 2),
    "RNN": lambda: nn.RNN(3, 4, 2, "relu", False, bidirectional=True),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "RNNCell": lambda: nn.RNNCell(3, 4, False, "relu"),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """Modules and inputs are made in float64, where results that should agree do so to rounding; and from one seed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same_results(one: Any, other: Any, x: Tensor) -> None:
    assert_same(one(x), other(x))


class Model(nn.Module):
    """Recurrent modules at several depths, and one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 3)
        self.encoder = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
        self.cells = nn.ModuleList([nn.LSTMCell(4, 4), nn.RNNCell(4, 4)])
        self.heads = nn.ModuleDict({"a": nn.RNN(4, 4, batch_first=True), "b": nn.Linear(4, 4)})
        self.again = self.heads["a"]

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.encoder(self.embed(tokens))
        y, _ = self.heads["a"](y)
        y, _ = self.again(y)
        h, _ = self.cells[0](y[:, -1])
        return self.heads["b"](self.cells[1](h))


def assert_converted(module: nn.Module, cls: type[nn.Module]) -> None:
    assert type(module) is cls, f"{type(module)} is not {cls}"


# convert


@every_maker
def test_converting_a_module_itself(make: Any) -> None:
    theirs = make().eval()
    theirs.mark = "kept"
    parameters = dict(theirs.named_parameters())
    ours = fastseq.convert(theirs)
    assert ours is not theirs
    assert_converted(ours, TWINS[type(theirs)])
    assert all(weight is parameters[name] for name, weight in ours.named_parameters())
    assert list(dict(ours.named_parameters())) == list(parameters)
    assert repr(ours) == repr(theirs)
    assert ours.mark == "kept"
    assert not ours.training
    same_results(ours, theirs, torch.randn(5, 3))
    assert fastseq.convert(ours) is ours


def test_converting_a_model_in_place() -> None:
    torch.manual_seed(0)
    model = Model()
    tokens = torch.randint(9, (2, 6))
    expected = model(tokens)
    shown, names = repr(model), list(model.state_dict())
    parameters = [id(weight) for weight in model.parameters()]
    assert fastseq.convert(model) is model
    assert_converted(model.encoder[0], fastseq.LSTM)
    assert_converted(model.cells[0], fastseq.LSTMCell)
    assert_converted(model.cells[1], fastseq.RNNCell)
    assert_converted(model.heads["a"], fastseq.RNN)
    assert_converted(model.heads["b"], nn.Linear)
    assert model.again is model.heads["a"]
    assert [id(weight) for weight in model.parameters()] == parameters
    assert list(model.state_dict()) == names
    assert repr(model) == shown
    assert_same(model(tokens), expected)


def test_an_optimizer_made_before_trains_the_converted_model() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastseq.convert(model)
    before = model.encoder[0].weight_hh_l0.clone()
    model(torch.randint(9, (2, 6))).sum().backward()
    optimizer.step()
    assert not torch.equal(model.encoder[0].weight_hh_l0, before)


def test_tied_parameters_stay_tied() -> None:
    model = nn.ModuleList([nn.LSTM(3, 3), nn.LSTM(3, 3)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    fastseq.convert(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0


def test_training_mode_and_requires_grad_are_kept() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    model.eval()
    model[0].weight_hh_l0.requires_grad_(False)
    fastseq.convert(model)
    assert not model[0].training
    assert not model[0].weight_hh_l0.requires_grad
    assert model[0].weight_ih_l0.requires_grad


@pytest.mark.parametrize("keep_type", [False, True])
def test_hooks_and_their_handles_are_kept(keep_type: bool) -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    seen: list[str] = []

    def hook(name: str) -> Any:
        return lambda *_: seen.append(name)

    handles = [
        model[0].register_forward_pre_hook(hook("before")),
        model[0].register_forward_hook(hook("after")),
        model[0].register_full_backward_hook(hook("backward")),
        model[0].register_state_dict_pre_hook(hook("state")),
        model[0].register_load_state_dict_post_hook(hook("loaded")),
    ]
    fastseq.convert(model, keep_type=keep_type)
    model(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["before", "after", "backward", "state", "loaded"]
    for handle in handles:
        handle.remove()
    model(torch.randn(5, 2, 3))
    model.state_dict()
    assert len(seen) == 5


def test_a_hook_that_knows_its_module_gets_the_new_one() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    seen: list[nn.Module] = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    fastseq.convert(model)
    gc.collect()
    model.load_state_dict(model.state_dict())
    assert len(seen) == 1
    assert seen[0] is model[0]


@pytest.mark.parametrize("keep_type", [False, True])
def test_parametrized_modules(keep_type: bool) -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    twin = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    fastseq.convert(model, keep_type=keep_type)
    assert isinstance(model[0], conversion.TypedLSTM if keep_type else fastseq.LSTM)
    assert parametrize.is_parametrized(model[0], "weight_hh_l0")
    assert [name for name, _ in model.named_parameters()] == names
    x = torch.randn(5, 2, 3)
    same_results(model, twin, x)
    model.load_state_dict(twin.state_dict())
    with torch.no_grad():
        for each in (model, twin):
            each[0].parametrizations.weight_hh_l0.original0.mul_(2.0)
    same_results(model, twin, x)
    model(x)[0].sum().backward()
    assert model[0].parametrizations.weight_hh_l0.original0.grad is not None
    fastseq.to_torch(model)
    assert isinstance(model[0], nn.LSTM)
    assert not isinstance(model[0], conversion.TypedLSTM)
    same_results(model, twin, x)
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is nn.LSTM


def test_pruned_and_weight_normed_modules() -> None:
    """Both put a plain tensor in the parameter's place, made anew by a hook before each forward."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LSTM(3, 4), nn.RNN(3, 4))
        prune.random_unstructured(model[0], "weight_hh_l0", amount=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(model[1], "weight_hh_l0")
        return model

    model, twin = build(), build()
    fastseq.convert(model)
    for ours, theirs in zip(model, twin, strict=True):
        same_results(ours, theirs, torch.randn(5, 2, 3))
    with torch.no_grad():
        for each in (model, twin):
            each[0].weight_hh_l0_orig.mul_(2.0)
            each[1].weight_hh_l0_g.mul_(2.0)
    for ours, theirs in zip(model, twin, strict=True):
        same_results(ours, theirs, torch.randn(5, 2, 3))
    prune.remove(model[0], "weight_hh_l0")
    assert isinstance(model[0].weight_hh_l0, nn.Parameter)


def test_the_old_module_is_independent_afterwards() -> None:
    theirs = nn.LSTM(3, 4)
    ours = fastseq.convert(theirs)
    ours.extra = nn.Linear(2, 2)
    ours.register_buffer("scale", torch.ones(1))
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    ours.eval()
    assert "extra" not in dict(theirs.named_modules())
    assert "scale" not in dict(theirs.named_buffers())
    assert theirs.weight_hh_l0.abs().max() > 0
    assert theirs.training
    assert theirs.weight_ih_l0 is ours.weight_ih_l0


def test_converted_modules_move_copy_and_pickle() -> None:
    model = fastseq.convert(Model())
    tokens = torch.randint(9, (2, 6))
    expected = model(tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin(tokens), expected)
        assert_converted(twin.encoder[0], fastseq.LSTM)
        assert twin.again is twin.heads["a"]
    assert model.float()(tokens).dtype == torch.float32


def test_gru_modules_are_left_alone_with_one_warning() -> None:
    model = nn.ModuleDict({"gru": nn.GRU(3, 4), "cell": nn.GRUCell(3, 4), "lstm": nn.LSTM(3, 4)})
    with pytest.warns(UserWarning, match=r"leaves GRU modules alone: gru, cell") as caught:
        fastseq.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(model["gru"]) is nn.GRU
    assert type(model["cell"]) is nn.GRUCell
    assert_converted(model["lstm"], fastseq.LSTM)
    gru = nn.GRU(3, 4)
    with pytest.warns(UserWarning, match="leaves GRU modules alone: GRU"):
        assert fastseq.convert(gru) is gru


class OwnForward(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return 2 * output, states


class OwnMethod(nn.RNN):
    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(self.num_layers, batch, self.hidden_size)


class OwnConstructor(nn.LSTM):
    """Only its constructor differs: afterwards it is an nn.LSTM like any other."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        nn.init.orthogonal_(self.weight_hh_l0)


@pytest.mark.parametrize("keep_type", [False, True])
def test_customised_subclasses_are_left_alone_with_one_warning(keep_type: bool) -> None:
    model = nn.ModuleList([OwnForward(3, 4), OwnMethod(3, 4), OwnConstructor(3)])
    with pytest.warns(UserWarning, match=r"alone, .*: 0 \(OwnForward\), 1 \(OwnMethod\)") as caught:
        fastseq.convert(model, keep_type=keep_type)
    assert len(caught) == 1
    assert [type(module) for module in model[:2]] == [OwnForward, OwnMethod]
    assert_converted(model[2], conversion.TypedLSTM if keep_type else fastseq.LSTM)


def test_nothing_to_convert() -> None:
    model = nn.Sequential(nn.Linear(3, 4), fastseq.LSTM(4, 4))
    children = list(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastseq.convert(model) is model
    assert all(one is other for one, other in zip(model, children, strict=True))
    for function in (fastseq.convert, fastseq.to_torch):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got list"):
            function([nn.LSTM(3, 4)])


# keep_type


@every_maker
def test_keep_type_passes_isinstance(make: Any) -> None:
    theirs = make().eval()
    ours = fastseq.convert(theirs, keep_type=True)
    assert isinstance(ours, type(theirs))
    assert type(ours) is not type(theirs)
    assert repr(ours) == repr(theirs)
    assert all(one is other for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(5, 3)
    same_results(ours, theirs, x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        same_results(twin, theirs, x)
    moved = copy.deepcopy(ours).float()
    assert moved(x.float())[0].dtype == torch.float32
    with fastseq.testing.use_implementation("reference"), torch.no_grad():
        same_results(ours, theirs, x)
    assert fastseq.convert(ours, keep_type=True) is ours


def test_keep_type_runs_on_fastseq() -> None:
    ours = fastseq.convert(nn.LSTM(3, 4, batch_first=True), keep_type=True)
    plain = fastseq.convert(ours)
    assert_converted(plain, fastseq.LSTM)
    x, lengths = torch.randn(2, 5, 3), torch.tensor([3, 5])
    output, _ = ours(x, lengths=lengths)
    assert output[0, 3:].abs().max() == 0
    same_results(lambda x: ours(x, lengths=lengths), lambda x: plain(x, lengths=lengths), x)
    with torch.no_grad():
        ours.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
        assert not torch.equal(ours(x)[0], plain(x)[0])


# to_torch


@every_maker
@pytest.mark.parametrize("keep_type", [False, True])
def test_there_and_back(make: Any, keep_type: bool) -> None:
    theirs = make().eval()
    parameters = list(theirs.parameters())
    x = torch.randn(5, 3)
    expected = tensors(theirs(x))
    back = fastseq.to_torch(fastseq.convert(theirs, keep_type=keep_type))
    assert type(back) is type(theirs)
    assert all(one is other for one, other in zip(back.parameters(), parameters, strict=True))
    assert back.__dict__.keys() == theirs.__dict__.keys()
    assert_same(back(x), expected)
    pickle.loads(pickle.dumps(back))


def test_to_torch_of_modules_built_by_fastseq() -> None:
    model = nn.Sequential(fastseq.LSTM(3, 4, 2, proj_size=2), fastseq.RNN(3, 4, nonlinearity="relu"))
    twin = copy.deepcopy(model)
    assert fastseq.to_torch(model) is model
    assert [type(module) for module in model] == [nn.LSTM, nn.RNN]
    for theirs, ours in zip(model, twin, strict=True):
        same_results(theirs, ours, torch.randn(5, 2, 3))
    assert fastseq.to_torch(model) is model
    moved = model[0].float()
    assert moved(torch.randn(5, 2, 3, dtype=torch.float32))[0].dtype == torch.float32
    fresh = nn.LSTM(3, 4, 2, proj_size=2)
    assert fastseq.to_torch(twin[0]).__dict__.keys() == fresh.__dict__.keys()


def test_to_torch_refuses_what_torch_lacks_and_changes_nothing() -> None:
    model = nn.ModuleDict({"lstm": fastseq.LSTM(3, 4), "rnn": fastseq.RNN(3, 4, nonlinearity="sigmoid")})
    with pytest.raises(ValueError, match="rnn has nonlinearity 'sigmoid', which torch"):
        fastseq.to_torch(model)
    assert_converted(model["lstm"], fastseq.LSTM)

    class Own(fastseq.LSTM):
        def helper(self) -> None: ...

    with pytest.raises(ValueError, match="the module is a Own, a subclass that defines more than a constructor"):
        fastseq.to_torch(Own(3, 4))


# patch


TORCH_CLASSES = {name: getattr(nn, name) for name in MAKERS}


def names_of_torch(name: str) -> list[Any]:
    return [getattr(place, name) for place in (torch.nn, torch.nn.modules, torch.nn.modules.rnn)]


def assert_unpatched() -> None:
    for name, cls in TORCH_CLASSES.items():
        assert names_of_torch(name) == [cls] * 3


def test_patch_swaps_the_names_and_puts_them_back() -> None:
    with fastseq.patch():
        for name in MAKERS:
            assert names_of_torch(name) == [getattr(fastseq, name)] * 3
        model = Model()
        assert_converted(model.encoder[0], fastseq.LSTM)
        assert isinstance(model.encoder[0], nn.LSTM)
    assert_unpatched()
    assert not isinstance(model.encoder[0], nn.LSTM)
    model(torch.randint(9, (2, 6))).sum().backward()


def test_patch_ends_on_an_exception_and_nests() -> None:
    with pytest.raises(KeyError), fastseq.patch():
        raise KeyError
    assert_unpatched()
    with fastseq.patch():
        with fastseq.patch():
            assert nn.LSTM is fastseq.LSTM
        assert nn.LSTM is fastseq.LSTM
    assert_unpatched()


def test_patch_as_a_decorator() -> None:
    @fastseq.patch()
    def build() -> nn.Module:
        return nn.LSTM(3, 4)

    assert_converted(build(), fastseq.LSTM)
    assert_converted(build(), fastseq.LSTM)
    assert_unpatched()


def test_convert_and_to_torch_inside_patch_mean_torchs_own_classes() -> None:
    theirs = TORCH_CLASSES["LSTM"](3, 4)
    with fastseq.patch():
        assert_converted(fastseq.convert(theirs), fastseq.LSTM)
        assert_converted(fastseq.to_torch(nn.LSTM(3, 4)), TORCH_CLASSES["LSTM"])


def test_a_pickled_torch_module_loads_as_fastseqs_inside_patch() -> None:
    theirs = nn.LSTM(3, 4, 2)
    content = pickle.dumps(theirs)
    with fastseq.patch():
        ours = pickle.loads(content)
    assert_converted(ours, fastseq.LSTM)
    same_results(ours, theirs, torch.randn(5, 2, 3))


def test_the_same_seed_builds_the_same_model_inside_patch() -> None:
    torch.manual_seed(0)
    theirs = Model()
    torch.manual_seed(0)
    with fastseq.patch():
        ours = Model()
    assert all(torch.equal(one, other) for one, other in zip(theirs.parameters(), ours.parameters(), strict=True))
