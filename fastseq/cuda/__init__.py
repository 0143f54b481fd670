"""Launchers of the CUDA C++ kernels in ``fastseq._cuda``: what Triton cannot express.

- ``cluster``: a cluster of 8 or 16 multiprocessors of a Hopper or newer GPU keeps the recurrent weights on chip and
  walks a tile of the batch through all steps (LSTM in half types);
- ``grid``: blocks on all multiprocessors do, which meet in global memory, where a cluster does not hold the weights;
- ``cell``: one product by cuBLAS and one fused kernel per step, for every other shape, dtype and device.

An extension that was never built is allowed, and said by :func:`why_unavailable`. None of this has run on a GPU yet.
"""

from __future__ import annotations

import importlib.util

from fastseq.cuda import extension

__all__ = ["why_unavailable"]


def why_unavailable(device: str) -> str | None:
    """The reason why the kernels cannot serve tensors on ``device`` (as ``"cuda"``), or None if they can."""
    if extension._cuda is None:
        return "the extension fastseq._cuda was not built (it needs nvcc; see FASTSEQ_CUDA in CONTRIBUTING.md)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, whose launchers the CUDA kernels share (the CUDA builds of torch bring it)"
    serves = "cpu" if extension._cuda.emulated else "cuda"
    return None if device == serves else f"the CUDA kernels serve CUDA tensors only, not {device}"
