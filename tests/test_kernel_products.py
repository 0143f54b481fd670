"""The matrix products around the GPU kernels, by the one tolerance rule."""

from __future__ import annotations

import pytest
import torch

from fastseq.testing import compare_tensor

products = pytest.importorskip("fastseq.kernels.products", reason="fastseq.kernels needs triton")


@pytest.mark.parametrize(("T", "B"), [(1, 40), (18, 18), (7, 35), (60, 5), (50, 1), (128, 32)])
def test_gradient_of_weights(T: int, B: int, seed: int) -> None:
    """As exact as autograd's, which adds up one step after the other; products of 324 numbers in one chain are not."""
    rows, seen = torch.rand(T * B, 200) - 0.5, torch.rand(T, B, 145) - 0.5
    truth = rows.double().t() @ seen.double().flatten(0, 1)
    by_step = torch.zeros(200, 145)
    for at_step, met in zip(rows.view(T, B, 200), seen, strict=True):
        by_step += at_step.t() @ met
    result = compare_tensor("dw", products.weight_gradient(rows, seen), ref=by_step, truth=truth)
    assert result.ok, result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_weights_in_half_types(dtype: torch.dtype, seed: int) -> None:
    """Rounded once, at the end."""
    rows, seen = (torch.rand(90, 40) - 0.5).to(dtype), (torch.rand(9, 10, 45) - 0.5).to(dtype)
    truth = rows.double().t() @ seen.double().flatten(0, 1)
    got = products.weight_gradient(rows, seen)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)
