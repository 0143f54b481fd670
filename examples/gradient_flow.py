"""Gradients through time, four ways: vanishing, exploding, clipped at every step, and carried by an LSTM.

The loss is read off the last of 100 steps, and ‖dL/dh_t‖ is shown for every step before it. Writes the picture:
python examples/gradient_flow.py gradient_flow.png
"""

import sys

import torch
from torch import Tensor

import fastseq
from fastseq.diagnostics import gradient_flow, plot_gradient_flow

STEPS, BATCH, INPUTS, HIDDEN = 100, 16, 8, 64


def scaled(nonlinearity: str, radius: float, **options: float) -> fastseq.RNN:
    """An Elman network whose recurrent matrix is orthogonal times ``radius``: that is what each step does to the
    gradient, but for the slope of the nonlinearity."""
    rnn = fastseq.RNN(INPUTS, HIDDEN, nonlinearity=nonlinearity, **options)
    with torch.no_grad():
        torch.nn.init.orthogonal_(rnn.weight_hh_l0).mul_(radius)
        rnn.bias_hh_l0.fill_(0.5 if nonlinearity == "relu" else 0.0)
    return rnn


def remembering() -> fastseq.LSTM:
    """An LSTM whose forget gates start open (Gers et al. 2000)."""
    lstm = fastseq.LSTM(INPUTS, HIDDEN)
    with torch.no_grad():
        lstm.bias_hh_l0[HIDDEN : 2 * HIDDEN] = 4.0
    return lstm


def curves() -> dict[str, Tensor]:
    """‖dL/dh_t‖ of each, [STEPS]."""
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, INPUTS)
    torch.manual_seed(1)
    networks = {
        "tanh RNN, ‖W‖ = 0.9": scaled("tanh", 0.9),
        "relu RNN, ‖W‖ = 2": scaled("relu", 2.0),
    }
    torch.manual_seed(1)
    scaled("tanh", 0.9)  # so that the clipped network has the weights of the one before
    networks["the same, grad_clip=1"] = scaled("relu", 2.0, grad_clip=1.0)
    networks["LSTM"] = remembering()
    return {name: gradient_flow(network, x) for name, network in networks.items()}


def main() -> None:
    found = curves()
    for name, norms in found.items():
        first, last = norms[0].item(), norms[-1].item()
        print(f"{name:>22}: ‖dL/dh‖ {first:.2e} at the first step, {last:.2e} at the last")
    if len(sys.argv) > 1:
        plot_gradient_flow(found, sys.argv[1])


if __name__ == "__main__":
    main()
