"""The processes that train together (torchrun), or this one alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; what they sum is the same on each of them."""

    rank: int = 0
    count: int = 1

    @classmethod
    def found(cls) -> Ranks:
        """Those of torch's default process group, if there is one."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows bars."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's part of ``total`` things: contiguous, sizes apart by at most one."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(value)
        return value

    def gather(self, part: Tensor, total: int) -> Tensor:
        """The parts ``[share, …]`` of all processes, joined to ``[total, …]``."""
        if self.count == 1:
            return part
        shares = [Ranks(rank, self.count).share(total) for rank in range(self.count)]
        parts = [part.new_empty(share.stop - share.start, *part.shape[1:]) for share in shares]
        if len({len(piece) for piece in parts}) == 1:
            distributed.all_gather(parts, part.contiguous())
        else:  # gloo wants equal sizes
            longest = max(len(piece) for piece in parts)
            padded = [part.new_zeros(longest, *part.shape[1:]) for _ in parts]
            mine = part.new_zeros(longest, *part.shape[1:])
            mine[: len(part)] = part
            distributed.all_gather(padded, mine)
            parts = [piece[: len(wanted)] for piece, wanted in zip(padded, parts, strict=True)]
        return torch.cat(parts)

    def parallel(self, module: nn.Module) -> nn.Module:
        """``module`` with its gradients averaged over the processes in its backward."""
        if self.count == 1:
            return module
        device = next(module.parameters()).device
        return nn.parallel.DistributedDataParallel(module, device_ids=None if device.type == "cpu" else [device])


def leave() -> None:
    """Leaves torch's default process group, as the last thing that a process does.

    DistributedDataParallel keeps references to the group, so that gloo's threads outlive it. One that lets go of the
    last step's tensors while the interpreter is being torn down aborts the process (pytorch/pytorch#179291): they get
    a moment for it.
    """
    distributed.destroy_process_group()
    time.sleep(0.2)
