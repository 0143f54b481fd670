"""Where the files of a data set are: a local folder first, then the cache, then the public source with a checksum."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_BLOCK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte

Folder = str | os.PathLike[str]


class DataNotFoundError(FileNotFoundError):
    """The files of a data set are neither here nor to be had; the message says where they were looked for."""


def local_folder(data_dir: Folder | None) -> Path | None:
    """``data_dir``, else the folder that FASTSEQ_DATA names, else None.

    Raises:
        DataNotFoundError: it is no folder.
    """
    given = data_dir if data_dir is not None else os.environ.get("FASTSEQ_DATA") or None
    if given is None:
        return None
    folder = Path(given)
    if not folder.is_dir():
        name = "data_dir" if data_dir is not None else "FASTSEQ_DATA"
        raise DataNotFoundError(f"{name}: expected a folder, got {str(given)!r}")
    return folder


def cache_folder(name: str) -> Path:
    """The folder in the cache for the data set ``name``; made if need be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "fastseq" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` in one step: half a file is never taken for a whole one.

    Nothing is left of it where the body raises or has removed it.
    """
    beside = target.with_name(f".{target.name}.part")
    try:
        yield beside
        if beside.exists():
            os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def find_local(name: str, files: Iterable[str], data_dir: Folder | None) -> Path | None:
    """The first of ``files`` (alternatives) in the local folder, in its subfolder ``name``, or in the cache."""
    folder = local_folder(data_dir)
    places = [] if folder is None else [folder / name, folder]
    for place in (*places, cache_folder(name)):
        for file in files:
            if (place / file).exists():
                return place / file
    return None


def find(
    name: str, files: Iterable[str], data_dir: Folder | None, *, url: str, checksum: str, algorithm: str = "sha256"
) -> Path:
    """The path of one file of the data set ``name``.

    Args:
        name: of the data set, and of the subfolder where its files may be.
        files: alternative names of the same content, the best first.
        data_dir: the local folder, or None for that of FASTSEQ_DATA.
        url: the public source, for when none of ``files`` is there.
        checksum: hexadecimal, of what ``url`` gives. A local file is taken as it is.
        algorithm: of the checksum.

    Raises:
        DataNotFoundError: nothing local, and the source cannot be reached or gives something else.
    """
    files = tuple(files)
    found = find_local(name, files, data_dir)
    if found is not None:
        return found
    target = cache_folder(name) / url.rpartition("/")[2]
    try:
        got = _fetch(url, target, checksum, algorithm)
    except OSError as error:
        raise _not_found(name, files, data_dir, f"{url} cannot be fetched ({error})") from None
    if got != checksum:
        raise _not_found(name, files, data_dir, f"{url} gives a file with {algorithm} {got}, expected {checksum}")
    return target


def _not_found(name: str, files: tuple[str, ...], data_dir: Folder | None, why: str) -> DataNotFoundError:
    folder = local_folder(data_dir)
    looked = "no local folder was given" if folder is None else f"not in {folder} or {folder / name}"
    return DataNotFoundError(
        f"{name}: {' or '.join(files)} not found: {looked}, and {why}. Put the file into a folder and name it with "
        "data_dir (--data-dir) or FASTSEQ_DATA"
    )


def _fetch(url: str, target: Path, checksum: str, algorithm: str) -> str:
    """Fetches ``url``; what has the right checksum becomes ``target`` in one step. Returns the checksum."""
    from tqdm import tqdm

    digest = hashlib.new(algorithm, usedforsecurity=False)
    with written_beside(target) as beside:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as source, beside.open("wb") as file:
            total = int(source.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=target.name, leave=False) as bar:
                _copy(source, file, digest, bar)
        if digest.hexdigest() != checksum:
            beside.unlink()
    return digest.hexdigest()


def _copy(source: IO[bytes], file: IO[bytes], digest: Any, bar: Any) -> None:
    while block := source.read(_BLOCK):
        file.write(block)
        digest.update(block)
        bar.update(len(block))
