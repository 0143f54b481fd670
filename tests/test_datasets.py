"""The loaders, on small files that the tests write; the real ones where FASTSEQ_DATA names a folder that has them."""

import gzip
import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastseq import datasets
from fastseq.datasets import mnist, source


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """No test reads or writes the user's cache, or fetches anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def unreachable(url, **_):
        raise OSError("no network in the tests")

    monkeypatch.setattr(source.urllib.request, "urlopen", unreachable)


@pytest.fixture
def nowhere(monkeypatch):
    monkeypatch.delenv("FASTSEQ_DATA", raising=False)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_mnist(folder, pack):
    rng = np.random.default_rng(0)
    made = {}
    for stem, count in (("train", 5), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        made[stem] = images, labels
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            if pack:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return made


@pytest.mark.parametrize("pack", [True, False])
def test_mnist(tmp_path, monkeypatch, pack):
    (tmp_path / "mnist").mkdir()
    made = write_mnist(tmp_path / "mnist", pack)
    got = datasets.load_mnist(tmp_path)
    images = np.concatenate([made["train"][0], made["t10k"][0]])
    assert got.data.dtype == np.float32
    np.testing.assert_array_equal(got.data, (images.reshape(8, 784).astype(np.float32) / 255))
    assert got.labels.tolist() == [*made["train"][1], *made["t10k"][1]]
    assert got.image_shape == (28, 28)
    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path / "mnist"))
    assert len(datasets.load_mnist(part="test").data) == 3
    with pytest.raises(ValueError, match="part: expected one of train, test, all, got 'val'"):
        datasets.load_mnist(part="val")


def test_mnist_refuses_what_is_not_idx(tmp_path, nowhere):
    write_mnist(tmp_path, pack=False)
    path = tmp_path / "train-images-idx3-ubyte"
    content = path.read_bytes()
    for bad, message in ((content[:-1], "bytes of data"), (b"\0\0\x0d\x03" + content[4:], "expected an IDX file")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            datasets.load_mnist(tmp_path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(content)[:100])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        mnist.read_idx(tmp_path / "cut.gz", 3)


def test_nothing_found_says_where_it_looked(tmp_path, monkeypatch, nowhere):
    with pytest.raises(datasets.DataNotFoundError, match=r"mnist: train-images.*not in .*cannot be fetched.*data_dir"):
        datasets.load_mnist(tmp_path)
    with pytest.raises(datasets.DataNotFoundError, match="no local folder was given"):
        datasets.load_mnist()
    with pytest.raises(datasets.DataNotFoundError, match="data_dir: expected a folder"):
        datasets.load_mnist(tmp_path / "none")
    monkeypatch.setenv("FASTSEQ_DATA", str(tmp_path / "none"))
    with pytest.raises(datasets.DataNotFoundError, match="FASTSEQ_DATA: expected a folder"):
        datasets.load_reuters21578()


def test_fetched_with_a_checksum(tmp_path, monkeypatch, nowhere):
    content = b"some data" * 1000

    class Answer(io.BytesIO):
        @property
        def headers(self):
            return {"Content-Length": str(len(content))}

    monkeypatch.setattr(source.urllib.request, "urlopen", lambda url, **_: Answer(content))
    url = "https://example.org/set/file.bin"
    with pytest.raises(datasets.DataNotFoundError, match=r"gives a file with sha256 .*, expected 00"):
        source.find("set", ("file.bin",), None, url=url, checksum="00")
    assert not list((tmp_path / "cache").rglob("*.bin*"))
    path = source.find("set", ("file.bin",), None, url=url, checksum=hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
    monkeypatch.setattr(source.urllib.request, "urlopen", None)  # the second time it is there
    assert source.find("set", ("file.bin",), None, url=url, checksum="anything") == path


SGML = """<!DOCTYPE lewis SYSTEM "lewis.dtd">
<REUTERS TOPICS="YES" NEWID="{n}">
<TOPICS>{topics}</TOPICS>
<TEXT><TITLE>T</TITLE>{body}</TEXT>
</REUTERS>
"""


def stories():
    words = {"earn": "profit dividend quarter &lt;ABC>", "acq": "merger takeover stake", "crude": "oil barrel opec"}
    n = 0
    for topic, count in (("earn", 6), ("acq", 4), ("crude", 2)):
        for index in range(count):
            n += 1
            yield SGML.format(n=n, topics=f"<D>{topic}</D>", body=f"<BODY>{words[topic]} and word{index}\n</BODY>")
    yield SGML.format(n=98, topics="<D>earn</D><D>acq</D>", body="<BODY>two topics</BODY>")
    yield SGML.format(n=99, topics="<D>earn</D>", body="")


@pytest.mark.parametrize("form", ["tar.xz", "tar.gz", "sgm"])
def test_reuters21578(tmp_path, form):
    texts = list(stories())
    parts = {"reut2-000.sgm": "".join(texts[:7]).encode("latin-1"), "reut2-001.sgm": "".join(texts[7:]).encode()}
    if form == "sgm":
        for name, content in parts.items():
            (tmp_path / name).write_bytes(content)
    else:
        with tarfile.open(tmp_path / f"reuters21578.{form}", f"w:{form[4:]}") as archive:
            for name, content in reversed(parts.items()):
                member = tarfile.TarInfo(f"data/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    got = datasets.load_reuters21578(tmp_path, classes=2, features=8)
    assert got.names == ("earn", "acq")
    assert got.labels.tolist() == [0] * 6 + [1] * 4
    assert got.data.shape == (10, 8)
    np.testing.assert_allclose(np.square(got.data).sum(1), 8, rtol=1e-5)
    with pytest.raises(ValueError, match="classes: expected 1 to 3"):
        datasets.load_reuters21578(tmp_path, classes=4)


def test_reuters21578_refuses_other_archives(tmp_path):
    (tmp_path / "reuters21578.tar.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a tar archive"):
        datasets.load_reuters21578(tmp_path)
    (tmp_path / "reuters21578.tar.gz").unlink()
    (tmp_path / "reut2-000.sgm").write_text("nothing")
    with pytest.raises(ValueError, match="no story"):
        datasets.load_reuters21578(tmp_path)


def test_rcv1(tmp_path, monkeypatch):
    import sklearn.datasets
    from scipy import sparse

    rng = np.random.default_rng(0)
    words = sparse.random(60, 30, 0.3, format="csr", random_state=0, dtype=np.float64)
    names = np.array(["C11", "CCAT", "E11", "ECAT", "GCAT", "MCAT"])
    roots = rng.integers(0, 4, 60)
    target = np.zeros((60, 6), dtype=np.uint8)
    column = [1, 4, 5, 3]  # CCAT, GCAT, MCAT, ECAT
    target[np.arange(60), [column[root] for root in roots]] = 1
    target[:10, 1] = target[:10, 4] = 1  # two roots: left out
    target[:, 0] = 1
    bunch = SimpleNamespace(data=words, target=sparse.csr_matrix(target), target_names=names)
    homes = []
    monkeypatch.setattr(sklearn.datasets, "fetch_rcv1", lambda data_home: homes.append(data_home) or bunch)
    got = datasets.load_reuters(tmp_path, features=12)
    assert homes == [tmp_path]
    assert isinstance(got.data, np.memmap)
    kept = target[:, column].sum(1) == 1
    assert got.data.shape == (kept.sum(), 12)
    assert got.labels.tolist() == roots[kept].tolist()
    chosen = np.sort(np.argsort(-(words[kept] != 0).sum(0).A1, kind="stable")[:12])
    dense = words[kept][:, chosen].toarray()
    length = np.linalg.norm(dense, axis=1, keepdims=True)
    np.testing.assert_allclose(got.data, dense / np.where(length, length, 1) * 12**0.5, rtol=1e-5, atol=1e-7)
    small = datasets.load_reuters10k(tmp_path, features=12)
    np.testing.assert_array_equal(small.data, got.data)

    def fails(data_home):
        raise OSError("no network")

    monkeypatch.setattr(sklearn.datasets, "fetch_rcv1", fails)
    with pytest.raises(datasets.DataNotFoundError, match="rcv1: not in data_dir"):
        datasets.load_reuters10k(tmp_path)


def test_stl10(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    image = rng.integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)  # rows, columns, colours
    for part, images in (("train", image[:2]), ("test", image[2:])):
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(range(1, 1 + len(images))))
    got = datasets.load_stl10_hog(tmp_path)
    assert got.data.shape == (3, 1488)
    assert got.labels.tolist() == [0, 1, 0]
    corner = image[1, :12, 12:24, 2].mean() / 255  # second square of the first row, blue
    assert got.data[1, 1296 + 5] == pytest.approx((corner - 0.2) * 10, rel=1e-5)
    # The same from the archive.
    other = tmp_path / "packed"
    other.mkdir()
    with tarfile.open(other / "stl10_binary.tar.gz", "w:gz") as archive:
        archive.add(folder, "stl10_binary")
    np.testing.assert_array_equal(datasets.load_stl10_hog(other).data, got.data)


def test_half_unpacked_stl10_is_unpacked_again(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    image = np.random.default_rng(1).integers(0, 256, 3 * 96 * 96, dtype=np.uint8).tobytes()
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(image)
        (folder / f"{part}_y.bin").write_bytes(b"\1")
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "stl10_binary.tar.gz", "w:gz") as archive:
        archive.add(folder, "stl10_binary")
    copy = shutil.copyfileobj

    def half(source, target):
        target.write(source.read(1000))
        if target.name.endswith("train_X.bin.part"):
            raise KeyboardInterrupt
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", half)
        with pytest.raises(KeyboardInterrupt):
            datasets.load_stl10_hog(packed)
    assert len(datasets.load_stl10_hog(packed).data) == 2


def test_digits():
    got = datasets.load_digits()
    assert got.data.shape == (1797, 64)
    assert got.data.min() == 0
    assert got.data.max() == 1
    assert got.names == tuple("0123456789")


def real(*files):
    folder = Path(os.environ.get("FASTSEQ_DATA", ""))
    if not os.environ.get("FASTSEQ_DATA") or not all((folder / file).exists() for file in files):
        pytest.skip(f"FASTSEQ_DATA names no folder with {files[0]}")
    return folder


def test_real_mnist():
    got = datasets.load_mnist(real("mnist/train-images-idx3-ubyte.gz", "mnist/t10k-images-idx3-ubyte.gz"))
    assert got.data.shape == (70000, 784)
    assert np.bincount(got.labels).tolist() == [6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958]


def test_real_reuters21578():
    got = datasets.load_reuters21578(real("reuters21578/reuters21578.tar.xz"))
    assert got.names == ("earn", "acq", "crude", "trade")
    assert np.bincount(got.labels).tolist() == [3735, 2125, 355, 333]
    assert got.data.shape == (6548, 2000)
