"""Gradients through time: what the recorder reads out of the kernels against autograd of a plain loop."""

import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.diagnostics import (
    GradientRangeWarning,
    GradientRecorder,
    GradientWatch,
    gradient_flow,
    jacobian_norms,
    plot_gradient_flow,
)
from fastseq.testing import compare_tensor

T, B, I, H = 7, 3, 4, 5


def loop(rnn, x, upstream, lengths=None, reset=None):
    """dL/dh_t [L·D, T, B, P] with L = Σ upstream · y, by autograd of one call a step, each h_t a node of its own."""
    is_lstm, directions = isinstance(rnn, fastseq.LSTM), 2 if rnn.bidirectional else 1
    kept = []
    for layer in range(rnn.num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            weights = rnn._weights(k)
            state = [x.new_zeros(B, size) for size in rnn._state_sizes()]
            hs, ys = [None] * T, [None] * T
            for t in reversed(range(T)) if direction else range(T):
                if reset is not None:
                    at = t + 1 if direction else t
                    start = reset[at] if at < T else torch.zeros(B, dtype=torch.bool)
                    state = [torch.where(start[:, None], 0.0, each) for each in state]
                _, *new = rnn._direction(x[t : t + 1], tuple(state), weights, None, False, None, False)
                h = new[0] * 1  # a node that both the output and the next step read
                h.retain_grad()
                hs[t] = h
                valid = torch.ones(B, 1, dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
                ys[t] = torch.where(valid, h, 0.0)
                state = [torch.where(valid, n, old) for n, old in zip([h, *new[1:]], state, strict=True)]
            kept.append(hs)
            outputs.append(torch.stack(ys))
        x = torch.cat(outputs, dim=2)
    (x * upstream).sum().backward()
    assert is_lstm == (len(rnn._state_sizes()) == 2)
    zero = torch.zeros_like(kept[0][0])
    return torch.stack([torch.stack([zero if h.grad is None else h.grad for h in hs]) for hs in kept])


CASES = {
    "lstm": lambda: fastseq.LSTM(I, H),
    "deep": lambda: fastseq.LSTM(I, H, num_layers=2, bidirectional=True),
    "projected": lambda: fastseq.LSTM(I, H, proj_size=2),
    "peephole": lambda: fastseq.LSTM(I, H, peephole=True, cell_clip=0.5),
    "torchaudio": lambda: fastseq.LSTM(I, H, layer_norm="torchaudio"),
    "tanh": lambda: fastseq.RNN(I, H, num_layers=2),
    "relu": lambda: fastseq.RNN(I, H, nonlinearity="relu", bidirectional=True),
    "clipped": lambda: fastseq.RNN(I, H, grad_clip=0.3),
}


@pytest.mark.parametrize("structure", ["plain", "lengths", "reset"])
@pytest.mark.parametrize("case", CASES)
def test_recorded_gradients_are_those_of_a_plain_loop(case, structure, seed):
    rnn = CASES[case]().double()
    x = 2 * torch.rand(T, B, I, dtype=torch.float64) - 1
    options = {}
    if structure == "lengths":
        options["lengths"] = torch.tensor([4, 0, T])
    if structure == "reset":
        options["reset"] = torch.rand(T, B) < 0.3
    with GradientRecorder(rnn) as recorder:
        y, _ = rnn(x, **options)
        upstream = 2 * torch.rand_like(y) - 1
        (y * upstream).sum().backward()
    got = torch.stack(recorder.gradients())
    truth = loop(rnn, x, upstream, **options)
    if rnn.grad_clip is not None:  # autograd shows the node before its gradient is clipped or after, ours after
        truth = truth.clamp(-rnn.grad_clip, rnn.grad_clip)
    result = compare_tensor("dL/dh", got, truth, truth)
    assert result.ok, str(result)
    assert torch.allclose(recorder.norms(), got.flatten(2).norm(dim=2), rtol=1e-14, atol=0)


def test_recording_changes_no_number(seed):
    rnn = fastseq.LSTM(33, 40, num_layers=2)
    x = torch.randn(20, 8, 33)
    y, _ = rnn(x)
    y.square().sum().backward()
    plain = [parameter.grad.clone() for parameter in rnn.parameters()]
    rnn.zero_grad()
    with GradientRecorder(rnn):
        recorded, _ = rnn(x)
        recorded.square().sum().backward()
    truth = fastseq.LSTM(33, 40, num_layers=2).double()
    truth.load_state_dict(rnn.state_dict())
    truth(x.double())[0].square().sum().backward()
    for name, got, ref, exact in zip(
        dict(rnn.named_parameters()), [p.grad for p in rnn.parameters()], plain, truth.parameters(), strict=True
    ):
        result = compare_tensor(name, got, ref, exact.grad)
        assert result.ok, str(result)
    assert "_direction" not in vars(rnn)
    assert torch.equal(rnn(x)[0], y)


def test_flow_of_a_loss_and_of_the_last_state(seed):
    rnn = fastseq.LSTM(I, H, num_layers=2, batch_first=True).double()
    x = torch.rand(B, T, I, dtype=torch.float64)
    lengths = torch.tensor([3, T, 5])
    flow = gradient_flow(rnn, x, lengths=lengths)
    assert all(parameter.grad is None for parameter in rnn.parameters())
    upstream = torch.zeros(T, B, H, dtype=torch.float64)
    upstream[lengths - 1, torch.arange(B)] = 1
    truth = loop(rnn, x.transpose(0, 1), upstream, lengths)
    assert torch.allclose(flow, truth[-1].flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    below = gradient_flow(rnn, x, lengths=lengths, layer=0, loss=lambda y: (y * upstream.transpose(0, 1)).sum())
    assert torch.allclose(below, truth[0].flatten(1).norm(dim=1), rtol=1e-12, atol=0)


def test_a_packed_batch_is_recorded(seed):
    rnn, x, lengths = fastseq.RNN(I, H).double(), torch.rand(T, B, I, dtype=torch.float64), torch.tensor([2, 7, 4])
    with GradientRecorder(rnn) as recorder:
        output, _ = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        output.data.sum().backward()
    truth = loop(rnn, x, torch.ones(T, B, H), lengths)
    assert torch.allclose(recorder.norms()[0], truth[0].flatten(1).norm(dim=1), rtol=1e-12, atol=0)


def test_half_types_and_unbatched_input(seed):
    rnn = fastseq.LSTM(I, H).bfloat16()
    flow = gradient_flow(rnn, torch.rand(T, I).bfloat16())
    assert flow.shape == (T,)
    assert flow.dtype == torch.float32
    assert (flow > 0).all()


@pytest.mark.parametrize("make", [CASES["tanh"], CASES["deep"], CASES["projected"], CASES["relu"]])
def test_jacobians_are_those_of_autograd(make, seed):
    rnn = make().double()
    x = torch.rand(T, B, I, dtype=torch.float64)
    if rnn.bidirectional:
        with pytest.raises(ValueError, match="one direction"):
            jacobian_norms(rnn, x, [(1, 0)])
        return
    pairs = [(5, 1), (2, 1), (T - 1, 0)]
    got = jacobian_norms(rnn, x, pairs, ord="fro")
    # Layer by layer with one call a step: h_j as a function of h_k alone.
    for (j, k), of_pair in zip(pairs, got, strict=True):
        below = x
        for layer in range(rnn.num_layers):
            inputs, weights = below, rnn._weights(layer)
            state = tuple(x.new_zeros(B, size) for size in rnn._state_sizes())
            below, *_ = rnn._direction(inputs, state, weights, None, False, None, False)
        _, *state = rnn._direction(inputs[: k + 1], state, weights, None, False, None, False)

        def last(h, j=j, k=k, state=state, inputs=inputs, weights=weights):
            states = (h, *state[1:])
            for t in range(k + 1, j + 1):
                _, *states = rnn._direction(inputs[t : t + 1], tuple(states), weights, None, False, None, False)
            return states[0]

        jacobian = torch.autograd.functional.jacobian(last, state[0])  # [B, P, B, P]
        exact = torch.stack([jacobian[b, :, b].norm() for b in range(B)])
        assert torch.allclose(of_pair, exact, rtol=1e-11, atol=0)


def test_identity_keeps_the_jacobian_at_one():
    rnn = fastseq.init.identity_(fastseq.RNN(1, 6, nonlinearity="relu"))
    x = torch.zeros(30, 2, 1)
    norms = jacobian_norms(rnn, x, [(29, 0), (10, 9)], torch.ones(1, 2, 6))
    assert torch.equal(norms, torch.ones(2, 2))


def test_watch_warns_once_and_again_after_recovery(seed):
    rnn = fastseq.RNN(I, H, nonlinearity="relu")
    x = torch.rand(T, B, I)
    with GradientWatch(rnn, low=1e-3, high=1e3) as watch:

        def step(number, scale):
            rnn(x)[0].sum().mul(scale).backward()
            return watch(number)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert step(0, 1.0).shape == (1, T)
        with pytest.warns(
            GradientRangeWarning, match=r"step 1, layer 0: the gradient explodes.*expected 0.001 to 1000"
        ):
            step(1, 1e6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(2, 1e6)
            step(3, 1.0)
        with pytest.warns(GradientRangeWarning, match="explodes"):
            step(4, 1e6)
        with pytest.warns(GradientRangeWarning, match="vanishes"):
            step(5, 1e-9)
        with pytest.warns(GradientRangeWarning, match="is not finite"):
            step(6, float("inf"))


def test_refusals():
    with pytest.raises(TypeError, match=r"rnn: expected fastseq\.LSTM or fastseq\.RNN"):
        gradient_flow(torch.nn.LSTM(2, 3), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="zoneout"):
        GradientRecorder(fastseq.LSTM(2, 3, zoneout=0.1))
    with pytest.raises(ValueError, match="haste"):
        GradientRecorder(fastseq.LSTM(2, 3, layer_norm="haste"))
    rnn = fastseq.LSTM(2, 3, recurrent_dropout=0.5)
    with pytest.raises(ValueError, match="recurrent dropout"):
        gradient_flow(rnn, torch.zeros(2, 1, 2))
    assert gradient_flow(rnn.eval(), torch.zeros(2, 1, 2)).shape == (2,)
    with pytest.raises(ValueError, match=r"loss: expected a function that gives a scalar"):
        gradient_flow(rnn, torch.zeros(2, 1, 2), loss=lambda y: y)
    with pytest.raises(RuntimeError, match="forward and a backward"), GradientRecorder(rnn) as recorder:
        recorder.norms()
    with pytest.raises(ValueError, match=r"pairs: expected \(j, k\)"):
        jacobian_norms(rnn, torch.zeros(2, 1, 2), [(0, 1)])
    with pytest.raises(ValueError, match="low, high"):
        GradientWatch(rnn, 2.0, 1.0)


def test_plot(tmp_path):
    figure = plot_gradient_flow({"a": torch.tensor([1.0, 0.0, 2.0]), "b": torch.ones(3)}, tmp_path / "flow.png")
    assert [panel.get_title() for panel in figure.axes] == ["a", "b"]
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
