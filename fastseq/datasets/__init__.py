"""Data sets for clustering, from a local folder, else from their public source.

Each loader looks in the folder ``data_dir``, else in the one that the environment variable FASTSEQ_DATA names, for the
files as their makers publish them; then in fastseq's cache; then it fetches them from the public source, compares the
checksum, and keeps them in the cache (``$XDG_CACHE_HOME/fastseq``, else ``~/.cache/fastseq``).
"""

from __future__ import annotations

from fastseq.datasets.digits import load_digits
from fastseq.datasets.labelled import Labelled
from fastseq.datasets.mnist import load_mnist
from fastseq.datasets.rcv1 import load_reuters, load_reuters10k
from fastseq.datasets.reuters21578 import load_reuters21578
from fastseq.datasets.source import DataNotFoundError
from fastseq.datasets.stl10 import load_stl10_hog

__all__ = [
    "DataNotFoundError",
    "Labelled",
    "load_digits",
    "load_mnist",
    "load_reuters",
    "load_reuters10k",
    "load_reuters21578",
    "load_stl10_hog",
]
