"""The matrix products of a layer that are cuBLAS's: the input projection before the recurrence, the gradients after it.

Half types are summed in float32 and rounded once at the end; torch may sum parts of a half-type product in half type.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in float32: a ``[M, K]``, b ``[K, N]``, of one dtype. ``out`` may have a row stride of its own."""
    if a.dtype == torch.float32:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # torch has no such product for the CPU; the interpreter's tests come here
        return wide_product(a.float(), b.float(), out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype of ``a``, rounded once."""
    return wide_product(a, b).to(a.dtype)


def weight_gradient(rows: Tensor, seen: Tensor) -> Tensor:
    """The gradient ``[N, K]`` of weights, in the dtype of ``seen``: of their sums' gradients ``rows [T * B, N]`` and of
    what the weights met, ``seen [T, B, K]``.

    float32 is added up in parts of T + B rows. Of n = T B terms in chains of m, and then a chain of n / m, the square
    of the error grows like n (m + n / m): autograd, a step at a time, has m = B, one product has m = n, and these parts
    are as exact as autograd with fewer of them. In half types, and in TF32, what the terms were rounded to outweighs
    that.
    """
    steps, batch, _ = seen.shape
    seen = seen.flatten(0, 1)
    part = steps + batch
    if seen.dtype != torch.float32 or input_precision(seen.dtype) == "tf32" or part >= len(rows):
        return product(rows.t(), seen)
    total = wide_product(rows[:part].t(), seen[:part])
    for first in range(part, len(rows), part):
        total.addmm_(rows[first : first + part].t(), seen[first : first + part])
    return total


def padded_gates(weight: Tensor, gates: int, width: int) -> Tensor:
    """``[gates * H, I]`` with every gate's rows padded by zeros to ``width``, as the tape has its columns."""
    hidden = weight.shape[0] // gates
    if hidden == width:
        return weight
    padded = weight.new_zeros((gates, width, weight.shape[1]))
    padded[:, :hidden] = weight.reshape(gates, hidden, -1)
    return padded.flatten(0, 1)


def input_precision(dtype: torch.dtype) -> str:
    """The precision that torch is set to for float32 products on CUDA: "tf32" where allowed, else "ieee", as for half
    types, where it means nothing."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def wide_state(grad: Tensor | None, state: Tensor) -> Tensor:
    """A gradient that arrives at a final state, in float32 memory that the kernel carries it in."""
    if grad is None:
        return torch.zeros(state.shape, dtype=torch.float32, device=state.device)
    return grad.to(torch.float32, copy=True).contiguous()


def previous_states(y: Tensor, h0: Tensor, flags: Tensor | None, reverse: bool, h_mask: Tensor | None = None) -> Tensor:
    """h_{t-1} as step t's product saw it, ``[T, B, P]``: y a step earlier, but h0 after padding and at the start, zero
    after a cut, and times ``h_mask``."""
    first = h0.unsqueeze(0)
    before = torch.cat([y[1:], first]) if reverse else torch.cat([first, y[:-1]])
    if flags is not None:
        padding = (flags & 2).bool()
        gone = torch.zeros_like(padding)  # whether the step before was padding
        if reverse:
            gone[:-1] = padding[1:]
        else:
            gone[1:] = padding[:-1]
        before = torch.where(gone.unsqueeze(2), h0, before)
        before = before.masked_fill((flags & 1).bool().unsqueeze(2), 0.0)
    return before if h_mask is None else before * h_mask


def mask_gradient(rows: Tensor, w_hh: Tensor, before: Tensor) -> Tensor:
    """``[B, H]``, the gradient of the mask on h: of the gates' gradients ``rows [T * B, ·]``, through the weights, at
    the states ``before [T, B, H]`` that the mask met."""
    return (wide_product(rows, w_hh).view(before.shape) * before).sum(0).to(before.dtype)
