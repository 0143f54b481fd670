"""A model with ``nn.LSTM`` inside, moved to fastseq. Prints the type of its layer now, and how far results differ."""

import torch
from torch import nn

import fastseq

model = nn.Sequential(nn.Linear(8, 32), nn.LSTM(32, 64, num_layers=2))
x = torch.randn(100, 16, 8)  # [T, B, I]
expected, _ = model(x)
model = fastseq.convert(model)  # every nn.LSTM, nn.RNN and cell inside is swapped, and keeps its weights
output, (h, c) = model(x)
output.sum().backward()  # BPTT, in C++ too
print(type(model[1]), f"{(output - expected).abs().max():.0e}")
