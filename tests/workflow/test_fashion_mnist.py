"""Fashion-MNIST's IDX files: read exactly, compressed or not, and refused when anything is off."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kddp_ext.workflow.datasets import fashion_mnist
from kddp_ext.workflow.datasets.fashion_mnist import read_fashion_mnist, read_idx
from kddp_ext.workflow.errors import DataFileError

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def idx(values: NDArray[np.uint8]) -> bytes:
    header = np.array([0x0800 + values.ndim, *values.shape], ">u4")
    return header.tobytes() + values.tobytes()


def images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_all(folder: Path, compressed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images(count)), ("labels-idx1", labels)):
            path, content = folder / f"{prefix}-{name}-ubyte", idx(values)
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "_TRAIN", ("train", 20))
    monkeypatch.setattr(fashion_mnist, "_TEST", ("t10k", 10))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("below", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_the_four_files_are_read(tmp_path: Path, compressed: bool, below: str) -> None:
    write_all(tmp_path / below, compressed)
    raw = read_fashion_mnist(tmp_path)
    np.testing.assert_array_equal(raw.train_images[..., 0], images(20))
    np.testing.assert_array_equal(raw.test_images[..., 0], images(10))
    assert raw.train_labels.tolist() == [*range(10), *range(10)]
    assert raw.train_images.flags.writeable  # or PyTorch warns


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 bytes in all"),
        (b"\x00\x00\x08", "3 bytes in all"),
        (idx(images(3)).replace(b"\x00\x00\x08\x03", b"\x00\x00\x0d\x03", 1), "magic number 0x0d03"),
        (idx(images(3)[:, 0]), "magic number 0x0802"),
        (idx(images(2)), "a header that says 2 x 28 x 28"),
        (idx(images(3))[:-1], "2367 bytes"),
        (idx(images(3)) + b"\x00", "2369 bytes"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_another_file_is_refused(tmp_path: Path, content: bytes, found: str, compressed: bool) -> None:
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataFileError, match=f"{path.name}: expected an IDX file of 3 x 28 x 28 .*{found}"):
        read_idx(path, (3, 28, 28))


@same_folder
@given(length=st.integers(0, 2367))
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx(images(3))[:length])
    with pytest.raises(DataFileError, match="images: expected"):
        read_idx(path, (3, 28, 28))


@same_folder
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_gzip_is_refused_or_intact(tmp_path: Path, share: float, flip: int, cut: bool) -> None:
    path = tmp_path / "images.gz"
    content = bytearray(gzip.compress(idx(images(3))))
    place = int(share * len(content))
    content[place] ^= flip
    path.write_bytes(content[:place] if cut else content)
    with contextlib.suppress(DataFileError):  # and no other error
        values = read_idx(path, (3, 28, 28))
        assert not cut
        np.testing.assert_array_equal(values, images(3))  # a byte of gzip's own that carries nothing


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(b"\0" * 3_000_000))
    with pytest.raises(DataFileError, match=r"images\.gz: expected"):
        read_idx(path, (3, 28, 28))


def test_foreign_labels_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path, compressed=False)
    labels = np.full(20, 12, np.uint8)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataFileError, match="train-labels-idx1-ubyte: expected labels from 0 to 9, found 20 others"):
        read_fashion_mnist(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_all(tmp_path, compressed=False)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataFileError, match=r"t10k-images-idx3-ubyte.*no such file"):
        read_fashion_mnist(tmp_path)
