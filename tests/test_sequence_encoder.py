"""The encoder gives the last valid hidden state, whichever way it reads."""

import pytest
import torch

import fastseq
from fastseq.models import SequenceEncoder

T, B, I, H = 6, 4, 3, 5
LENGTHS = torch.tensor([6, 2, 0, 4])


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoding_is_that_of_each_sequence_alone(cell, direction, batch_first, seed):
    encoder = SequenceEncoder(I, H, 2, cell=cell, direction=direction, batch_first=batch_first).double()
    x = torch.rand(T, B, I, dtype=torch.float64)
    got = encoder(x.transpose(0, 1) if batch_first else x, LENGTHS)
    assert got.shape == (B, encoder.output_size)
    for b, length in enumerate(LENGTHS.tolist()):
        if length == 0:
            assert not got[b].any()
            continue
        alone = x[:length, b]
        if direction == "backward":
            alone = alone.flip(0)
        output, state = encoder.recurrent(alone)
        h_n = state[0] if cell == "lstm" else state
        expected = h_n[-2:].flatten() if direction == "both" else output[-1]
        assert torch.allclose(got[b], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_all_steps_are_valid_without_lengths(direction, seed):
    encoder = SequenceEncoder(I, H, direction=direction)
    x = torch.rand(T, B, I)
    assert torch.allclose(encoder(x), encoder(x, torch.full((B,), T)))
    converted = fastseq.to_torch(encoder)
    assert torch.allclose(converted(x), encoder(x), atol=1e-6)


def test_padding_is_not_read(seed):
    encoder = SequenceEncoder(I, H, direction="both")
    x = torch.rand(T, B, I)
    spoilt = x.clone()
    spoilt[torch.arange(T)[:, None] >= LENGTHS] = 1e6
    assert torch.equal(encoder(x, LENGTHS), encoder(spoilt, LENGTHS))


def test_refusals():
    with pytest.raises(ValueError, match="direction: expected one of 'forward', 'backward', 'both', got 'left'"):
        SequenceEncoder(2, 3, direction="left")
    with pytest.raises(ValueError, match="cell"):
        SequenceEncoder(2, 3, cell="gru")
    encoder = SequenceEncoder(2, 3, direction="backward")
    with pytest.raises(fastseq.ShapeError, match="input: expected three dimensions"):
        encoder(torch.zeros(2, 2))
    with pytest.raises(fastseq.ShapeError, match=r"lengths: expected shape \[B\] = \[4\]"):
        encoder(torch.zeros(5, 4, 2), torch.tensor([1]))
