"""fastseq.LSTM and fastseq.RNN with what torch.nn does not have: noise, variants, resets, all states."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import reference
from fastseq.testing import implementations, use_implementation

T, B, I, H, L = 6, 3, 4, 5, 2
DTYPE = torch.float64

# Constructor arguments that have no noise in evaluation nor in training, and the parameters that they bring.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "peephole": ({"peephole": True}, {"weight_peephole": (3, H)}),
    "haste": (
        {"layer_norm": "haste"},
        {"weight_ln_ih": (4 * H,), "weight_ln_hh": (4 * H,), "weight_ln_c": (H,), "bias_ln_c": (H,)},
    ),
    "torchaudio": (
        {"layer_norm": "torchaudio"},
        {"weight_ln_gates": (4 * H,), "bias_ln_gates": (4 * H,), "weight_ln_c": (H,), "bias_ln_c": (H,)},
    ),
    "clips": ({"cell_clip": 0.3, "grad_clip": 0.05}, {}),
    "recompute": ({"recompute": True, "proj_size": 3}, {}),
}


def random(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=DTYPE) * 2 - 1


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter random, so that none hides as a one or a zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5)
    return module


def flat(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_equal(got: Any, expected: Any, exact: bool = True) -> None:
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-13)


def layers_by_reference(module: Any, x: Tensor, states: tuple[Tensor, ...], **options: Any) -> tuple[Any, ...]:
    """Output and last states, layer by layer with fastseq.reference; ``options`` hold masks as callables of k."""
    lstm = isinstance(module, fastseq.LSTM)
    directions = 2 if module.bidirectional else 1
    finals = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            suffix = f"_l{layer}" + "_reverse" * direction
            own = {n.removesuffix(suffix): p for n, p in module.named_parameters() if n.endswith(suffix)}
            own = {n: p for n, p in own.items() if not n.endswith("_reverse") and "_l" not in n.replace("_ln_", "")}
            named = {
                "weight_ih": "w_ih",
                "weight_hh": "w_hh",
                "bias_ih": "b_ih",
                "bias_hh": "b_hh",
                "weight_hr": "w_hr",
            }
            weights = {named.get(n, n.replace("weight_peephole", "peephole")): p for n, p in own.items()}
            given = {name: value(k) if callable(value) else value for name, value in options.items()}
            function = reference.lstm if lstm else reference.rnn
            y, *last = function(x, *(state[k] for state in states), **weights, reverse=direction == 1, **given)
            outputs.append(y)
            finals.append(last)
        x = torch.cat(outputs, dim=2)
    return x, tuple(torch.stack(each) for each in zip(*finals, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_variants_are_the_reference_layer_by_layer(variant: str, bidirectional: bool, seed: int) -> None:
    """Outputs and every gradient, with lengths, resets and reset states."""
    made, extra = VARIANTS[variant]
    module: Any = shaken(fastseq.LSTM(I, H, L, bidirectional=bidirectional, dtype=DTYPE, **made))
    directions = 2 if bidirectional else 1
    D = L * directions
    suffixes = [f"_l{k}{way}" for k in range(L) for way in ("", "_reverse")[:directions]]
    names = dict(nn.LSTM(I, H, L, bidirectional=bidirectional, proj_size=made.get("proj_size", 0)).named_parameters())
    assert [n for n, _ in module.named_parameters()] == [*names, *(stem + s for s in suffixes for stem in extra)]
    for stem, shape in extra.items():
        assert all(getattr(module, stem + suffix).shape == shape for suffix in suffixes)

    P = made.get("proj_size", H)
    x, h0, c0 = random(T, B, I), random(D, B, P), random(D, B, H)
    resets = random(T, D, B, P), random(D, B, H)
    leaves = [x, h0, c0, *resets]
    for leaf in leaves:
        leaf.requires_grad_()
    lengths, reset = torch.tensor([T, 0, 4]), torch.rand(T, B) < 0.3
    got = module(x, (h0, c0), lengths=lengths, reset=reset, reset_state=resets)
    options = {name: made[name] for name in ("cell_clip", "grad_clip") if name in made}
    expected = layers_by_reference(
        module,
        x,
        (h0, c0),
        lengths=lengths,
        reset=reset,
        reset_state=lambda k: (resets[0][:, k], resets[1][k]),
        **options,
    )
    assert_equal(got, expected, exact=False)
    leaves += [*module.parameters()]
    arriving = [torch.randn_like(value) for value in flat(got)]
    grads = [torch.autograd.grad(flat(out), leaves, arriving, allow_unused=True) for out in (got, expected)]
    assert all(grad is not None for grad in grads[0])
    assert_equal(*grads, exact=False)


# Noise.


def test_recurrent_dropout_is_one_scaled_mask_per_sequence(seed: int) -> None:
    for cls, count in ((fastseq.LSTM, 2), (fastseq.RNN, 1)):
        module: Any = shaken(cls(I, H, L, recurrent_dropout=0.4, bidirectional=True, dtype=DTYPE))
        x, states = random(T, B, I), tuple(random(2 * L, B, H) for _ in range(count))
        torch.manual_seed(seed)
        got = module(x, states if count == 2 else states[0])
        torch.manual_seed(seed)
        masks = [torch.nn.functional.dropout(torch.ones(B, H, dtype=DTYPE), 0.4) for _ in range(2 * L)]
        assert {0.0, 1 / 0.6} == set(torch.stack(masks).unique().tolist())
        assert_equal(got, layers_by_reference(module, x, states, h_mask=lambda k, m=masks: m[k]), exact=False)
        assert_equal(
            module.eval()(x, states if count == 2 else states[0]), layers_by_reference(module, x, states), False
        )


def test_zoneout_keeps_old_values_and_in_evaluation_the_expectation(seed: int) -> None:
    module: Any = shaken(fastseq.LSTM(I, H, L, zoneout=(0.3, 0.2), proj_size=3, dtype=DTYPE))
    x, states = random(T, B, I), (random(L, B, 3), random(L, B, H))
    torch.manual_seed(seed)
    got = module(x, states)
    torch.manual_seed(seed)
    masks = [
        (torch.empty(T, B, 3, dtype=bool).bernoulli_(0.3), torch.empty(T, B, H, dtype=bool).bernoulli_(0.2))
        for _ in range(L)
    ]
    options = {"zoneout_h": lambda k: masks[k][0], "zoneout_c": lambda k: masks[k][1]}
    assert_equal(got, layers_by_reference(module, x, states, **options), exact=False)
    expected = layers_by_reference(module, x, states, zoneout_h=0.3, zoneout_c=0.2)
    assert_equal(module.eval()(x, states), expected, exact=False)


def test_zoneout_rates(seed: int) -> None:
    """The share of values kept is the rate, of h and of c, and one number means both."""
    assert fastseq.LSTM(1, 1, zoneout=0.25).zoneout == (0.25, 0.25)
    module = fastseq.LSTM(2, 50, zoneout=(0.1, 0.4))
    h0 = torch.ones(1, 40, 50)  # a value that the fresh state never has
    _, _, states = module(torch.randn(1, 40, 2), (h0, h0), return_states=True)
    for value, rate in ((states.h, 0.1), (states.c, 0.4)):
        assert abs((value == 1).double().mean().item() - rate) < 5 * (rate * (1 - rate) / 2000) ** 0.5


NOISY: dict[str, Any] = {"recurrent_dropout": 0.3, "zoneout": 0.2, "dropout": 0.2}


def test_noise_repeats_under_manual_seed_on_every_backend(seed: int) -> None:
    module = fastseq.LSTM(I, H, L, bidirectional=True, dtype=torch.float64, **NOISY)
    x = torch.randn(T, B, I, dtype=torch.float64)

    def run() -> Any:
        torch.manual_seed(seed)
        return module(x)

    first = run()
    assert_equal(run(), first)
    for implementation in implementations("lstm", options=["h_mask", "zoneout"]):
        with use_implementation(implementation):
            assert_equal(run(), first, exact=False)
    assert not torch.equal(module(x)[0], first[0])
    module.eval()
    assert_equal(module(x), module(x))


@pytest.mark.parametrize("cls", [fastseq.LSTM, fastseq.RNN])
def test_zero_probability_costs_nothing(cls: Any, seed: int) -> None:
    """No number is drawn, and it is the plain operation that runs."""
    zeros: dict[str, Any] = {"recurrent_dropout": 0.0, "dropout": 0.0} | (
        {"zoneout": (0, 0)} if cls is fastseq.LSTM else {}
    )
    module = cls(I, H, L, **zeros)
    x = torch.randn(T, B, I)
    state = torch.get_rng_state()
    with torch.profiler.profile() as profile:
        got = module(x)
    assert torch.equal(torch.get_rng_state(), state)
    names = {event.name for event in profile.events() if event.name.startswith("fastseq::")}
    assert names == {f"fastseq::{cls.__name__.lower()}_fwd"}
    assert_equal(got, module.eval()(x))
    noisy = cls(I, H, L, **dict.fromkeys(zeros, 0.5)).eval()
    if cls is fastseq.RNN:  # in evaluation there is no trace of recurrent dropout
        with use_implementation("cpp"):
            noisy(x)


# Resets.


@pytest.mark.parametrize("cls", [fastseq.LSTM, fastseq.RNN])
def test_changing_one_episode_alters_no_other_in_both_directions(cls: Any, seed: int) -> None:
    """Of one layer: a second one would read both directions of the first at every step."""
    module = cls(I, H, bidirectional=True, dtype=DTYPE)
    x = random(T, B, I).requires_grad_()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[[2, 4]] = True
    state = tuple(random(2, B, H).requires_grad_() for _ in range(2))
    options = {"reset": reset, "reset_state": state if cls is fastseq.LSTM else state[0]}
    before = module(x, **options)[0]
    changed = torch.cat([x[:2], random(2, B, I), x[4:]])
    after = module(changed, **options)[0]
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[2:4], after[2:4])
    (gradient,) = torch.autograd.grad(before[2:4].sum(), x)
    assert (gradient[:2] == 0).all()
    assert (gradient[4:] == 0).all()
    assert (gradient[2:4] != 0).all()


@pytest.mark.parametrize("cls", [fastseq.LSTM, fastseq.RNN])
def test_layouts_of_resets_and_states(cls: Any, seed: int) -> None:
    """batch_first, without a batch, and packed: the same numbers as time-major."""
    lstm = cls is fastseq.LSTM
    module = cls(I, H, L, bidirectional=True, dtype=DTYPE)
    x, lengths, reset = random(T, B, I), torch.tensor([4, T, 2]), torch.rand(T, B) < 0.4
    hx, resets = tuple(random(2 * L, B, H) for _ in range(2)), (random(T, 2 * L, B, H), random(2 * L, B, H))

    def of(states: tuple[Tensor, ...]) -> Any:
        return states if lstm else states[0]

    output, last, states = module(x, of(hx), lengths=lengths, reset=reset, reset_state=of(resets), return_states=True)
    assert isinstance(states, fastseq.States if lstm else fastseq.RNNStates)
    assert [value.shape for value in states] == [(2 * L, T, B, H), (2 * L, T, B, H), (2 * L, T, B, 4 * H)][
        : len(states)
    ]
    # The output is the last layer's h, the last states are those of the last valid steps.
    torch.testing.assert_close(torch.cat([*states.h[-2:]], dim=2), output, rtol=0, atol=0)
    for value, end in zip(states, flat(last), strict=False):
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(value[::2, n - 1, b], end[::2, b])
            assert torch.equal(value[1::2, 0, b], end[1::2, b])
            assert (value[:, n:, b] == 0).all()
    module.batch_first = True
    first = module(
        x.transpose(0, 1), of(hx), lengths=lengths, reset=reset.T, reset_state=of(resets), return_states=True
    )
    assert_equal(first, (output.transpose(0, 1), last, type(states)(*(v.transpose(1, 2) for v in states))))
    module.batch_first = False
    one = module(
        x[:, 0],
        of(tuple(state[:, 0] for state in hx)),
        lengths=lengths[0],
        reset=reset[:, 0],
        reset_state=of((resets[0][:, :, 0], resets[1][:, 0])),
        return_states=True,
    )
    alone = output[:, 0], [v[:, 0] for v in flat(last)], type(states)(*(v[:, :, 0] for v in states))
    assert_equal(one, alone, exact=False)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    result, last_packed, states_packed = module(packed, of(hx), reset=reset, reset_state=of(resets), return_states=True)
    assert_equal((pad_packed_sequence(result)[0], last_packed, states_packed), (output, last, states), exact=False)


def test_states_are_differentiable(seed: int) -> None:
    module = fastseq.LSTM(I, H, L, bidirectional=True, dtype=DTYPE)
    x = random(T, B, I).requires_grad_()
    arriving = [random(2 * L, T, B, size) for size in (H, H, 4 * H)]

    def loss(*leaves: Tensor) -> Tensor:
        states = module(leaves[0], return_states=True)[2]
        return sum((value * weight).sum() for value, weight in zip(states, arriving, strict=True))

    assert torch.autograd.gradcheck(loss, (x,))
    (gradient,) = torch.autograd.grad(loss(x), module.weight_hh_l0)
    assert (gradient != 0).all()


# The module as an object.


def test_a_plain_module_is_torchs_in_state_and_seed(seed: int) -> None:
    for theirs, ours in ((nn.LSTM, fastseq.LSTM), (nn.RNN, fastseq.RNN)):
        torch.manual_seed(seed)
        expected = theirs(I, H, L, bidirectional=True).state_dict()
        torch.manual_seed(seed)
        got = ours(I, H, L, bidirectional=True).state_dict()
        assert list(got) == list(expected)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        if ours is fastseq.LSTM:  # what is beyond torch's is drawn after it
            torch.manual_seed(seed)
            more = ours(I, H, L, bidirectional=True, peephole=True).state_dict()
            assert all(torch.equal(more[name], expected[name]) for name in expected)
            ln = ours(I, H, layer_norm="haste")
            assert (ln.weight_ln_ih_l0 == 1).all()
            assert (ln.bias_ln_c_l0 == 0).all()


EVERYTHING: dict[str, Any] = NOISY | {"layer_norm": "haste", "cell_clip": 3.0, "grad_clip": 1.0, "recompute": True}


def test_repr_pickle_and_copies(seed: int) -> None:
    module = fastseq.LSTM(I, H, L, **EVERYTHING)
    shown = "LSTM(4, 5, num_layers=2, dropout=0.2, recurrent_dropout=0.3, grad_clip=1.0, recompute=True, zoneout=0.2, "
    assert repr(module) == shown + "layer_norm='haste', cell_clip=3.0)"
    assert repr(fastseq.LSTM(I, H, zoneout=(0.1, 0))) == "LSTM(4, 5, zoneout=(0.1, 0.0))"
    assert repr(fastseq.RNN(I, H, recurrent_dropout=0.1)) == "RNN(4, 5, recurrent_dropout=0.1)"
    module.eval()
    x = torch.randn(T, B, I)
    with torch.no_grad():
        module.step(x[0])  # so that there are packed weights, which do not travel
        expected = module(x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert repr(other) == repr(module)
        assert other._packed is None
        with torch.no_grad():
            assert_equal(other(x), expected)


def test_a_state_from_before_the_options_loads() -> None:
    module = fastseq.LSTM(I, H)
    state = {name: value for name, value in module.__getstate__().items() if name in nn.LSTM(I, H).__dict__}
    old = fastseq.LSTM.__new__(fastseq.LSTM)
    old.__setstate__(state)
    x = torch.randn(T, B, I)
    assert_equal(old(x), module(x))
    assert repr(old) == repr(module)


@pytest.mark.parametrize("keep_type", [False, True])
def test_a_converted_module_may_switch_options_on(keep_type: bool, seed: int) -> None:
    theirs = nn.LSTM(I, H, dtype=DTYPE)
    converted: Any = fastseq.convert(theirs, keep_type=keep_type)
    converted.grad_clip = 0.01
    x = random(T, B, I).requires_grad_()
    clipped, free = (torch.autograd.grad(module(x)[0].sum(), x)[0] for module in (converted, theirs))
    assert not torch.allclose(clipped, free)
    reset = torch.ones(T, B, dtype=torch.bool)
    assert converted(x, reset=reset, reset_state=(random(1, B, H), random(1, B, H)), return_states=True)[2].c.shape
    with pytest.raises(ValueError, match=r"grad_clip=0\.01, which torch\.nn does not have"):
        fastseq.to_torch(converted)


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "peephole", "layer_norm", "cell_clip", "recompute"])
def test_to_torch_refuses_what_torch_does_not_have(name: str) -> None:
    value = EVERYTHING.get(name, True)
    model = nn.Sequential(nn.Linear(2, I), fastseq.LSTM(I, H, **{name: value}))
    with pytest.raises(ValueError, match=rf"to_torch: 1 has {name}=.*, which torch\.nn does not have"):
        fastseq.to_torch(model)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"recurrent_dropout": 1.1}, ValueError, r"recurrent_dropout: expected a number from 0 to 1, got 1\.1"),
        ({"recurrent_dropout": "no"}, TypeError, "recurrent_dropout: .*, got 'no'"),
        ({"zoneout": -0.1}, ValueError, r"zoneout: .*, got -0\.1"),
        ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, "zoneout: expected a number or two, .*, got 3"),
        ({"zoneout": True}, TypeError, "zoneout"),
        ({"peephole": 1}, TypeError, "peephole: expected a bool, got int"),
        ({"layer_norm": True}, ValueError, "layer_norm: expected None, 'haste' or 'torchaudio', got True"),
        ({"layer_norm": "haste", "peephole": True}, ValueError, "peephole: .* neither haste's nor torchaudio's"),
        ({"cell_clip": 0}, ValueError, "cell_clip: expected a number above 0 or None, got 0"),
        ({"grad_clip": "1"}, TypeError, "grad_clip: .*, got '1'"),
        ({"recompute": None}, TypeError, "recompute: expected a bool, got NoneType"),
    ],
)
def test_bad_constructor_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fastseq.LSTM(I, H, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"reset_state": (torch.zeros(1, B, H),) * 2}, ValueError, "reset_state: expected None without reset"),
        ({"reset": True, "reset_state": torch.zeros(1, B, H)}, TypeError, "reset_state: expected a tuple"),
        ({"reset": True, "reset_state": (torch.zeros(1, B, H), 3)}, TypeError, r"reset_state\[1\]: .*, got int"),
        (
            {"reset": True, "reset_state": (torch.zeros(1, B, H), torch.zeros(B, H))},
            ValueError,
            r"reset_state\[1\]: expected the shape \[1, 3, 5\] of hx, or with a leading T \[6, 1, 3, 5\], got \[3, 5\]",
        ),
        ({"reset": True, "reset_state": (torch.zeros(1, B, H).double(),) * 2}, TypeError, r"reset_state\[0\].*float64"),
        ({"recompute": True, "return_states": True}, ValueError, "recompute: expected False with return_states"),
    ],
)
def test_bad_arguments_of_the_forward(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    module = fastseq.LSTM(I, H, recompute=arguments.pop("recompute", False))
    if "reset" in arguments:
        arguments = arguments | {"reset": torch.zeros(T, B, dtype=torch.bool)}
    with pytest.raises(error, match=words):
        module(torch.randn(T, B, I), **arguments)
