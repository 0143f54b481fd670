"""Episodes that end in the middle of a rollout: the loop over steps that recurrent policies use, and one fused call.

A rollout holds T steps of B environments, each reset by itself when an episode is done. ``done[t]`` says that step t
was the last of its episode, so that the observation at t + 1 is the first of the next one, and the state must be cut
there: ``reset[t] = done[t - 1]``. For t = 0 that is the ``done`` of the rollout before, which has to be carried over
with the state. No gradient crosses a reset.

Prints how far results and gradients of the two forms differ, and the times of both.
"""

import time

import torch
from torch import Tensor

import fastseq

T, B, OBSERVATION, HIDDEN = 128, 16, 24, 64

State = tuple[Tensor, Tensor]


def in_a_loop(lstm: fastseq.LSTM, observations: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State]:
    """One call per step, with the state multiplied by zero where an episode starts."""
    outputs = []
    for observation, starts in zip(observations, reset, strict=True):
        keep = (~starts).to(observation.dtype)[:, None]  # [B, 1]
        output, state = lstm(observation[None], (state[0] * keep, state[1] * keep))
        outputs.append(output)
    return torch.cat(outputs), state


def fused(lstm: fastseq.LSTM, observations: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State]:
    """One call for the whole rollout."""
    return lstm(observations, state, reset=reset)


def main() -> None:
    torch.manual_seed(0)
    lstm = fastseq.LSTM(OBSERVATION, HIDDEN)
    observations = torch.randn(T, B, OBSERVATION)
    done = torch.rand(T, B) < 0.05
    state = torch.randn(1, B, HIDDEN), torch.randn(1, B, HIDDEN)  # from the rollout before
    done_before = torch.rand(B) < 0.05  # its last step
    reset = torch.cat([done_before[None], done[:-1]])  # reset[t] = done[t - 1]

    results = []
    for form in (in_a_loop, fused):
        form(lstm, observations, state, reset)  # the first call of all pays for what is made once
        began = time.perf_counter()
        output, last = form(lstm, observations, state, reset)
        grads = torch.autograd.grad(output.square().mean(), list(lstm.parameters()))
        took = time.perf_counter() - began
        print(f"{form.__name__}: {1e3 * took:.1f} ms for forward and backward")
        results.append((output, *last, *grads))
    difference = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    print(f"{int(reset.sum())} resets; outputs, states and gradients differ by at most {difference:.0e}")


if __name__ == "__main__":
    main()
