"""Forecasting the oil temperature of a transformer: 96 hours of it in, the next 24 hours out.

ETTh1 (Zhou et al. 2021, "Informer"): 17,420 hourly rows; twelve months to learn, four months to test, as there. The
last hidden state of an LSTM is the encoding of the past, and a linear layer tells how far from the last reading the
next ones will be: at first, that they are the same. The other six columns are left out, as in the paper's univariate
setting: what they tell of the months that are learnt does not hold in the test's, where with them the error is larger
than that of the last value. The same model is trained with torch.nn.LSTM beside. FASTSEQ_DATA names the folder that
holds ett/ETTh1.csv (https://github.com/zhouhaoyi/ETDataset).
"""

import os
import sys
from pathlib import Path

import numpy
import torch
from side_by_side import train
from torch import Tensor, nn

from fastseq.models import SequenceEncoder

PAST, FUTURE, EPOCHS = 96, 24, 4
MONTH = 30 * 24
TARGET = 7  # the column OT


class Forecaster(nn.Module):
    """x [B, PAST, 1] -> the next hours, [B, FUTURE], both in standard deviations."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.encoder = SequenceEncoder(1, hidden, batch_first=True)
        self.read_out = nn.Linear(hidden, FUTURE)
        nn.init.zeros_(self.read_out.weight)
        nn.init.zeros_(self.read_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        # All relative to the last reading: the level drifts over the months.
        return x[:, -1] + self.read_out(self.encoder(x - x[:, -1:]))


def windows(rows: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """rows [N, 1] -> pasts [M, PAST, 1] and futures [M, FUTURE]."""
    whole = rows.unfold(0, PAST + FUTURE, stride).transpose(1, 2)
    return whole[:, :PAST], whole[:, PAST:, 0]


def main() -> None:
    path = Path(os.environ.get("FASTSEQ_DATA", ".")) / "ett" / "ETTh1.csv"
    if not path.exists():
        sys.exit(f"skipped: no {path}; FASTSEQ_DATA names the folder of data")
    torch.manual_seed(0)
    rows = torch.from_numpy(
        numpy.loadtxt(path, delimiter=",", skiprows=1, usecols=[TARGET], ndmin=2, dtype=numpy.float32)
    )
    learnt = rows[: 12 * MONTH]
    rows = (rows - learnt.mean(0)) / learnt.std(0)
    x, y = windows(rows[: 12 * MONTH], stride=4)
    models, ratio = train(Forecaster(), x, y, nn.functional.mse_loss, epochs=EPOCHS, learning_rate=1e-3)
    x, y = windows(rows[16 * MONTH - PAST : 20 * MONTH], stride=4)
    print(f"    last value: mean squared error {(x[:, -1] - y).square().mean():.4f} (standardised)")
    for name, each in models.items():
        with torch.no_grad():
            error = nn.functional.mse_loss(each(x), y)
        print(f"{name:>14}: mean squared error {error:.4f}")
    print(f"a training step with fastseq is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
