"""Identity initialisation, on every kind of Elman network."""

import pytest
import torch
from torch import nn

import fastseq
from fastseq.init import identity_


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastseq.RNN(3, 5, num_layers=2, bidirectional=True, nonlinearity="relu"),
        lambda: fastseq.RNN(3, 5, bias=False),
        lambda: nn.RNN(3, 5, nonlinearity="relu"),
        lambda: fastseq.RNNCell(3, 5, nonlinearity="relu"),
        lambda: nn.RNNCell(3, 5),
    ],
)
def test_recurrent_weights_are_the_identity_and_biases_zero(make):
    rnn = make()
    before = {name: value.clone() for name, value in rnn.named_parameters()}
    assert identity_(rnn, scale=0.5) is rnn
    for name, value in rnn.named_parameters():
        if name.startswith("weight_hh"):
            assert torch.equal(value, 0.5 * torch.eye(5))
        elif name.startswith("bias"):
            assert not value.any()
        else:
            assert torch.equal(value, before[name])
        assert value.requires_grad


def test_input_std():
    torch.manual_seed(0)
    rnn = fastseq.RNN(100, 100, num_layers=2)
    upper = rnn.weight_ih_l1.clone()
    identity_(rnn, input_std=1e-3)
    assert rnn.weight_ih_l0.std().item() == pytest.approx(1e-3, rel=0.05)
    assert torch.equal(rnn.weight_ih_l1, upper)


def test_a_state_is_carried_unchanged():
    rnn = identity_(fastseq.RNN(2, 4, nonlinearity="relu"))
    h0 = torch.rand(1, 3, 4)
    _, h_n = rnn(torch.zeros(50, 3, 2), h0)
    assert torch.equal(h_n, h0)


def test_the_cache_of_step_notices():
    rnn = fastseq.RNN(2, 4, nonlinearity="relu")
    h = torch.rand(1, 3, 4)
    with torch.no_grad():
        rnn.step(torch.zeros(3, 2), h)
        identity_(rnn)
        assert torch.equal(rnn.step(torch.zeros(3, 2), h)[1], h)


def test_refusals():
    with pytest.raises(TypeError, match="rnn: expected an RNN or an RNNCell, got LSTM"):
        identity_(fastseq.LSTM(2, 3))
    with pytest.raises(ValueError, match="scale"):
        identity_(fastseq.RNN(2, 3), scale=float("nan"))
    with pytest.raises(ValueError, match="input_std"):
        identity_(fastseq.RNN(2, 3), input_std=0.0)
