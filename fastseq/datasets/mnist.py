"""MNIST from its four IDX files (LeCun et al. 1998)."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastseq.datasets.labelled import Labelled
from fastseq.datasets.source import Folder, find

_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # the mirror that torchvision takes
_CHECKSUMS = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_PARTS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
_UBYTE = 0x08


def load_mnist(data_dir: Folder | None = None, *, part: str = "all") -> Labelled:
    """Handwritten digits of 28 by 28 pixels in [0, 1]: ``data [70000, 784]``.

    Args:
        data_dir: the folder of the IDX files, or the one above it if theirs is ``mnist``; gzipped or not.
        part: ``"train"`` (60,000), ``"test"`` (10,000), or ``"all"``, as clustering takes them.

    Raises:
        ValueError: no such part, or a file that is not what it should be.
        DataNotFoundError: a file is neither local nor to be had.
    """
    if part not in _PARTS:
        raise ValueError(f"part: expected one of {', '.join(_PARTS)}, got {part!r}")
    images, labels = [], []
    for stem in _PARTS[part]:
        images.append(_read(f"{stem}-images-idx3-ubyte", data_dir, 3))
        labels.append(_read(f"{stem}-labels-idx1-ubyte", data_dir, 1))
        if len(images[-1]) != len(labels[-1]):
            raise ValueError(f"{stem}: {len(images[-1])} images, but {len(labels[-1])} labels")
    pixels = np.concatenate(images)
    data = pixels.reshape(len(pixels), -1).astype(np.float32)
    data /= 255.0
    return Labelled.of(data, np.concatenate(labels), range(10), (pixels.shape[1], pixels.shape[2]))


def _read(stem: str, data_dir: Folder | None, rank: int) -> NDArray[np.uint8]:
    archive = f"{stem}.gz"
    path = find("mnist", (archive, stem), data_dir, url=_URL + archive, checksum=_CHECKSUMS[stem])
    return read_idx(path, rank)


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """The unsigned bytes of one IDX file: two zero bytes, type, rank, sizes (big-endian, 4 bytes each), then the data.

    Raises:
        ValueError: the file is not of this form or of another rank, or its length is not what its sizes say.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None
    if content[:4] != bytes((0, 0, _UBYTE, rank)):
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes with rank {rank}, got {content[:4].hex()}")
    sizes = np.frombuffer(content, dtype=">u4", count=rank, offset=4).tolist()
    start = 4 + 4 * rank
    if len(content) != start + math.prod(sizes):
        raise ValueError(f"{path}: expected {math.prod(sizes)} bytes of data {sizes}, got {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes)
