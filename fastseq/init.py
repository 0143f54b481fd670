"""Initialisations of recurrent layers."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastseq.nn.base import checked_limit
from fastseq.nn.cell import RNNCellForward

_ELMAN = ("RNN_TANH", "RNN_RELU", "RNN_SIGMOID")


@torch.no_grad()
def identity_(rnn: nn.Module, *, scale: float = 1.0, input_std: float | None = None) -> nn.Module:
    """Starts an Elman network as the identity: every W = ``scale`` · I, every bias 0 (Le, Jaitly & Hinton 2015, "A
    simple way to initialize recurrent networks of rectified linear units", section 2).

    With relu, a hidden state that nothing enters is then carried unchanged, and so is its gradient: ‖∂h_j/∂h_k‖ = 1
    at the start of training, however far k lies from j.

    Args:
        rnn: ``fastseq.RNN``, ``fastseq.RNNCell``, ``torch.nn.RNN`` or ``torch.nn.RNNCell``. The paper's has
            ``nonlinearity="relu"``; others are taken too.
        scale: of the identity. The paper takes 0.01 where long memory hurts.
        input_std: if given, the input weights of the first layer are drawn from N(0, input_std²), as the paper does
            with 0.001; they are left as they are if None.

    Returns:
        ``rnn``, changed in place.

    Raises:
        TypeError: ``rnn`` is no Elman network.
        ValueError: ``scale`` is not finite or ``input_std`` not above 0.
    """
    is_cell = isinstance(rnn, (nn.RNNCell, RNNCellForward))
    if not is_cell and getattr(rnn, "mode", None) not in _ELMAN:
        raise TypeError(f"rnn: expected an RNN or an RNNCell, got {type(rnn).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    input_std = checked_limit("input_std", input_std)
    for name, parameter in rnn.named_parameters():
        if name.startswith("weight_hh"):
            nn.init.eye_(parameter).mul_(scale)
        elif name.startswith("bias"):
            nn.init.zeros_(parameter)
        elif input_std is not None and (is_cell or name in ("weight_ih_l0", "weight_ih_l0_reverse")):
            nn.init.normal_(parameter, std=input_std)
    return rnn
