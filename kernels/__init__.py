"""Triton kernels and their launchers for CUDA tensors, installed as ``fastseq.kernels`` (a symlink to this folder).

One stem per operation, as everywhere: ``lstm.py`` and ``rnn.py``. What they share is in ``device.py`` (functions of the
kernels), ``plan.py`` (which regime and tile sizes serve a shape), ``launch.py`` and ``products.py`` (the matrix products
that are cuBLAS's). Importing this package does not import triton; importing one of its modules but ``plan`` does.
"""
