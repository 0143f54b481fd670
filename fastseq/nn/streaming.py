"""One step at a time: weights packed once, and a cache of them that notices when the weights change.

Packing costs more than a step, so only here are packed weights kept. ``Tensor._version`` does not see every write
(``.data`` passes it by), so an entry is valid only while each weight is the same tensor, at the same address, of the
same version, and has the same values in a strided sample. A write through ``.data`` of a few numbers that the sample
does not hold is not seen: call ``module.train(module.training)`` after such a write, which drops the cache, as
``_apply`` (``to``, ``half``, …) and ``load_state_dict`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

SAMPLE = 64  # numbers of each weight that are compared at every step

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class Fingerprint:
    """What tells that a weight is still what it was when it was packed."""

    weight: Tensor  # held, so that its address cannot be given to another
    address: int
    version: int | None
    sample: Tensor  # a view of the weight
    values: Tensor  # what the sample held

    @classmethod
    def of(cls, weight: Tensor) -> Fingerprint | None:
        """None for a weight whose numbers do not lie side by side, which has no such view."""
        if not weight.is_contiguous():
            return None
        # An odd stride, so that the sample does not stay within one column.
        sample = weight.detach().view(-1)[:: max(1, weight.numel() // SAMPLE) | 1]
        return cls(weight, weight.data_ptr(), _version(weight), sample, sample.clone())

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the same tensor with the same numbers."""
        return (
            weight is self.weight
            and weight.data_ptr() == self.address
            and _version(weight) == self.version
            and torch.equal(self.sample, self.values)
        )


class PackedWeights(Generic[Handle]):
    """The packed weights of every layer.

    Args:
        pack: makes a handle of the weights of one layer, by name: whatever the step of that layer wants to have.
    """

    def __init__(self, pack: Callable[[Mapping[str, Tensor]], Handle]) -> None:
        self._pack = pack
        self._entries: dict[int, tuple[dict[str, Fingerprint | None], Handle]] = {}

    def handle(self, layer: int, weights: Mapping[str, Tensor]) -> Handle:
        """The handle of ``layer``, packed anew if its weights are not those of the last time."""
        entry = self._entries.get(layer)
        if entry is not None and entry[0].keys() == weights.keys():
            prints = entry[0]
            for name, weight in weights.items():
                print_ = prints[name]
                if print_ is None or not print_.holds(weight):
                    break
            else:
                return entry[1]
        handle = self._pack(weights)
        self._entries[layer] = ({name: Fingerprint.of(weight) for name, weight in weights.items()}, handle)
        return handle


def dense_copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the operations take them, in memory of their own: the packing for a step without a kernel."""
    return {name: weight.detach().clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}


def may_pack(*tensors: Any) -> bool:
    """Whether a step may read packed weights: in plain eager mode on the CPU, when no gradient is wanted."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_any_autocast_enabled()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version
