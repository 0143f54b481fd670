"""Triton kernels and launchers, installed as ``fastseq.kernels`` (``fastseq/kernels`` is a symlink to this folder).

There is none yet: this release runs on the CPU through the C++ kernels of ``csrc/``.
"""
