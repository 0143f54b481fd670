"""Triton kernels and their launchers for CUDA tensors, installed as ``fastseq.kernels`` (a symlink to this folder).

One stem per operation, as everywhere. What the recurrences share is in ``device.py`` (functions of the kernels),
``plan.py`` (which regime and tile sizes serve a shape) and ``products.py`` (the matrix products that are cuBLAS's), and
what the operations on points and centres share in ``clusters.py``; ``launch.py`` starts them all, ``ahead.py`` compiles
for a GPU that is not there. Importing this package, ``plan`` or ``products`` does not import triton; the other modules
do.
"""
