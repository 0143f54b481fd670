"""Reuters-21578: newswire stories of 1987 in SGML (Lewis 1997)."""

from __future__ import annotations

import html
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastseq._extras import require
from fastseq.datasets.labelled import Labelled
from fastseq.datasets.source import Folder, find

_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/reuters21578-mld/reuters21578.tar.gz"
_SHA256 = "3bae43c9b14e387f76a61b6d82bf98a4fb5d3ef99ef7e7075ff2ccbcf59f9d30"  # as in scikit-learn's examples
_FILES = ("reuters21578.tar.xz", "reuters21578.tar.gz", "reut2-000.sgm")

_STORY = re.compile(r"<REUTERS\b.*?</REUTERS>", re.DOTALL)
_TOPICS = re.compile(r"<TOPICS>(.*?)</TOPICS>", re.DOTALL)
_TOPIC = re.compile(r"<D>(.*?)</D>")
_BODY = re.compile(r"<BODY>(.*?)</BODY>", re.DOTALL)


class Story(NamedTuple):
    """One story of the collection."""

    topics: tuple[str, ...]
    body: str  # empty where the story is a headline only


def load_reuters21578(data_dir: Folder | None = None, *, classes: int = 4, features: int = 2000) -> Labelled:
    """The stories of one topic, of the largest topics, as the paper makes its REUTERS: ``data [N, features]``.

    Stories with a body and exactly one topic, of the ``classes`` largest topics (earn, acq, crude and trade: 6,548
    stories); the most frequent words without stop words, weighted ``(1 + log tf) idf``, rows of length 1, times
    the square root of ``features`` (Xie et al. 2016, section 4.1: so that the mean square of a row is 1).

    Args:
        data_dir: the folder of ``reuters21578.tar.xz`` (or ``.tar.gz``, or the files ``reut2-*.sgm``), or the one above
            it if its name is ``reuters21578``.
        classes: how many topics.
        features: how many words.

    Raises:
        ValueError: a file is not what it should be, or ``classes`` exceeds the topics there are.
        DataNotFoundError: the files are neither local nor to be had.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    text = require("sklearn.feature_extraction.text", "cluster", "load_reuters21578")
    path = find("reuters21578", _FILES, data_dir, url=_URL, checksum=_SHA256)
    stories = [story for story in read_stories(path) if story.body and len(story.topics) == 1]
    counts = Counter(story.topics[0] for story in stories)
    if not 1 <= classes <= len(counts):
        raise ValueError(f"classes: expected 1 to {len(counts)}, the topics in {path}, got {classes}")
    # Sorted by name where two are of one size, so that the choice does not hang on the order of the stories.
    names = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:classes]]
    chosen = [story for story in stories if story.topics[0] in names]
    vectorizer = text.TfidfVectorizer(max_features=features, stop_words="english", sublinear_tf=True, dtype=np.float32)
    data = vectorizer.fit_transform([story.body for story in chosen]).toarray()
    data *= np.float32(data.shape[1] ** 0.5)
    return Labelled.of(data, [names.index(story.topics[0]) for story in chosen], names)


def read_stories(path: Path) -> Iterator[Story]:
    """All stories of an archive, or of the ``.sgm`` files beside ``path``, in the order of the files' names.

    Raises:
        ValueError: no archive, or nothing that looks like a story in it.
    """
    found = False
    for content in _sgml(path):
        for match in _STORY.finditer(content):
            found = True
            story = match.group()
            topics, body = _TOPICS.search(story), _BODY.search(story)
            yield Story(
                tuple(_TOPIC.findall(topics.group(1))) if topics else (),
                html.unescape(body.group(1)).strip() if body else "",
            )
    if not found:
        raise ValueError(f"{path}: no story (<REUTERS>…</REUTERS>) in it")


def _sgml(path: Path) -> Iterator[str]:
    if path.suffix == ".sgm":
        for file in sorted(path.parent.glob("*.sgm")):
            yield file.read_text(encoding="latin-1")
        return
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile() and member.name.endswith(".sgm")]
            for member in sorted(members, key=lambda member: member.name):
                content = archive.extractfile(member)
                assert content is not None  # isfile() said so
                yield content.read().decode("latin-1")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not a tar archive ({error})") from None
