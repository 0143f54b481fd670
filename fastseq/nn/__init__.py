"""The modules: recurrent layers and cells with ``torch.nn``'s interface. ``convert.py``: to and from torch's own."""

from fastseq.nn.cell import LSTMCell, RNNCell
from fastseq.nn.lstm import LSTM
from fastseq.nn.rnn import RNN

__all__ = ["LSTM", "RNN", "LSTMCell", "RNNCell"]
