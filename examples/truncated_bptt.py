"""Truncated backpropagation through time over an endless stream: the state is carried from window to window, the
gradient is not.

The stream is a square wave of unknown phase with noise, and the model says at every step what comes next. A window is
half a period, so that without the carried state the model often cannot know where in the period it is. Prints the loss
with the state carried and with the state thrown away at every window; the noise alone costs 0.01.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastseq
from fastseq.functional import detach_state

WINDOW, BATCH, PERIOD = 6, 16, 12


def endless_stream() -> Iterator[Tensor]:
    """Windows [WINDOW + 1, BATCH, 1]; each begins with the last number of the one before."""
    phase = torch.randint(0, PERIOD, (BATCH,))
    start = 0
    while True:
        time = torch.arange(start, start + WINDOW + 1)[:, None] + phase  # [WINDOW + 1, BATCH]
        clean = (time % PERIOD < PERIOD // 2).float() * 2 - 1
        generator = torch.Generator().manual_seed(start)
        yield (clean + 0.1 * torch.randn(clean.shape, generator=generator)).unsqueeze(-1)
        start += WINDOW


def train(carry: bool, windows: int = 400) -> float:
    """The mean loss of the last tenth of the windows."""
    torch.manual_seed(0)
    lstm, head = fastseq.LSTM(1, 32), nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-2)
    state, losses = None, []
    for _, window in zip(range(windows), endless_stream(), strict=False):
        # The graph of the windows before ends here; their last state does not.
        state = detach_state(state) if carry else None
        output, state = lstm(window[:-1], state)
        loss = nn.functional.mse_loss(head(output), window[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-windows // 10 :]
    return sum(last) / len(last)


def main() -> None:
    torch.set_num_threads(1)  # a second thread would only wait: the layer is small
    print(f"loss with the state carried:     {train(carry=True):.3f}")
    print(f"loss with the state thrown away: {train(carry=False):.3f}")


if __name__ == "__main__":
    main()
