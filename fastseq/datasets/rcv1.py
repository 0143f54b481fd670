"""REUTERS and REUTERS-10K of the DEC paper, from RCV1-v2 (Lewis et al. 2004) as scikit-learn fetches it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq._extras import require
from fastseq.datasets.labelled import Labelled
from fastseq.datasets.source import DataNotFoundError, Folder, cache_folder, local_folder, written_beside

_ROOTS = ("CCAT", "GCAT", "MCAT", "ECAT")
_ROWS = 20_000  # made dense at a time


def load_reuters(data_dir: Folder | None = None, *, features: int = 2000) -> Labelled:
    """The stories of exactly one of the four root categories: ``data [685071, features]``, a memory map of 5.5 GB.

    The words that occur in most stories, weighted as RCV1-v2 comes (``(1 + log tf) idf``), rows of length 1 over these
    words, times the square root of ``features`` (Xie et al. 2016, section 4.1). The map is made once, in the cache.

    Args:
        data_dir: the folder of scikit-learn's copy (its ``data_home``), or None for that of FASTSEQ_DATA, else
            scikit-learn's own; scikit-learn fetches what is missing and compares checksums.
        features: how many words.

    Raises:
        DataNotFoundError: RCV1 is neither local nor to be had.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    words, labels = _single_root(data_dir, "load_reuters")
    words = words[:, _frequent(words, features)]
    path = cache_folder("rcv1") / f"reuters-{words.shape[0]}x{words.shape[1]}.npy"
    if not path.exists():
        with written_beside(path) as beside:
            data = np.lib.format.open_memmap(beside, "w+", np.float32, words.shape)
            for start in range(0, words.shape[0], _ROWS):
                data[start : start + _ROWS] = _scaled(words[start : start + _ROWS])
            data.flush()
    return Labelled(np.load(path, mmap_mode="r"), labels, _ROOTS)


def load_reuters10k(data_dir: Folder | None = None, *, features: int = 2000, seed: int = 0) -> Labelled:
    """A random 10,000 of :func:`load_reuters`: ``data [10000, features]``.

    Args:
        data_dir: as for :func:`load_reuters`.
        features: how many words, the most frequent ones of all stories.
        seed: of the sample (the paper's own is not published).

    Raises:
        DataNotFoundError, ModuleNotFoundError: as :func:`load_reuters`.
    """
    words, labels = _single_root(data_dir, "load_reuters10k")
    count = min(10_000, len(labels))
    sample = np.sort(np.random.default_rng(seed).permutation(len(labels))[:count])
    chosen = words[:, _frequent(words, features)][sample]
    return Labelled.of(_scaled(chosen), labels[sample], _ROOTS)


def _single_root(data_dir: Folder | None, purpose: str) -> tuple[Any, Any]:
    """The sparse rows of one root category, and which one it is."""
    datasets = require("sklearn.datasets", "cluster", purpose)
    try:
        bunch = datasets.fetch_rcv1(data_home=local_folder(data_dir))
    except OSError as error:
        raise DataNotFoundError(
            "rcv1: not in data_dir, FASTSEQ_DATA or scikit-learn's data_home, and scikit-learn cannot fetch it "
            f"({error})"
        ) from None
    columns = [list(bunch.target_names).index(name) for name in _ROOTS]
    roots = bunch.target[:, columns].toarray()
    single = roots.sum(axis=1) == 1
    return bunch.data[single].tocsr(), roots[single].argmax(axis=1).astype(np.int64)


def _frequent(words: Any, features: int) -> Any:
    """The columns of the words that occur in most rows, in their own order."""
    counts = np.bincount(words.indices, minlength=words.shape[1])
    return np.sort(np.argsort(-counts, kind="stable")[:features])


def _scaled(rows: Any) -> Any:
    """Dense rows of length ``sqrt(features)``; a row without any of the words stays zero."""
    dense = rows.toarray().astype(np.float32)
    length = np.sqrt(np.square(dense).sum(axis=1, keepdims=True))
    return dense / np.where(length > 0, length, 1) * np.float32(dense.shape[1] ** 0.5)
