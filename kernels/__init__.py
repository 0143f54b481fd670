"""Triton kernels and their launchers for CUDA tensors, installed as ``fastseq.kernels`` (a symlink to this folder).

One stem per operation, as everywhere: ``lstm.py`` and ``rnn.py``. What they share is in ``device.py`` (functions of
the kernels), ``plan.py`` (which regime and tile sizes serve a shape), ``launch.py`` and ``products.py`` (the matrix
products that are cuBLAS's); ``ahead.py`` compiles for a GPU that is not there. Importing this package, ``plan`` or
``products`` does not import triton; the other modules do.
"""
