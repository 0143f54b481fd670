"""What a launch asks of shared memory: wavefronts, of which each takes a cycle and serves every bank once.

A warp's access takes as many as its busiest bank has words of, in turns of at most 128 bytes. The fewest are as many
as its words fill all banks; the rest are bank conflicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BANKS, WORD = 32, 4


@dataclass
class Wavefronts:
    """Of one instruction: how many it took, and the fewest that its accesses could have taken."""

    taken: int = 0
    fewest: int = 0


@dataclass
class Traffic:
    """The accesses of the first ``blocks`` blocks to shared memory, by kernel and instruction."""

    blocks: int = 1
    by_instruction: dict[tuple[str, str], Wavefronts] = field(default_factory=dict)

    def note(self, kernel: str, instruction: str, addresses: np.ndarray, each: int, warps: np.ndarray) -> None:
        """An instruction's accesses of ``each`` bytes at ``addresses [n]`` by the threads of ``warps [n]``."""
        counts = self.by_instruction.setdefault((kernel, instruction), Wavefronts())
        turn = BANKS * WORD // max(each, WORD)
        for warp in np.unique(warps):
            own = addresses[warps == warp].astype(np.int64)
            for begin in range(0, len(own), turn):
                words = own[begin : begin + turn, None] + np.arange(0, max(each, WORD), WORD)
                words = np.unique(words // WORD)
                counts.taken += int(np.bincount(words % BANKS).max())
                counts.fewest += -(-len(words) // BANKS)

    def total(self) -> Wavefronts:
        """Of all instructions."""
        counts = self.by_instruction.values()
        return Wavefronts(sum(count.taken for count in counts), sum(count.fewest for count in counts))

    def conflicts(self) -> list[str]:
        """The instructions that take more wavefronts than they could, worst first."""
        worst = sorted(self.by_instruction.items(), key=lambda item: item[1].fewest - item[1].taken)
        return [
            f"{kernel}: {counts.taken} wavefronts for {counts.fewest}: {instruction}"
            for (kernel, instruction), counts in worst
            if counts.taken > counts.fewest
        ]
