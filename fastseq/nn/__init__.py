"""The modules: recurrent layers and cells with ``torch.nn``'s interface. ``convert.py``: to and from torch's own."""

from fastseq.nn.cell import LSTMCell, RNNCell
from fastseq.nn.lstm import LSTM, States
from fastseq.nn.rnn import RNN, RNNStates

__all__ = ["LSTM", "RNN", "LSTMCell", "RNNCell", "RNNStates", "States"]
