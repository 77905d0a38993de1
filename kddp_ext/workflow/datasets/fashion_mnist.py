"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): four IDX files, compressed or not."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kddp_ext.workflow.datasets import RawDataset
from kddp_ext.workflow.datasets.download import fashion_mnist_folder
from kddp_ext.workflow.datasets.files import check_labels, find_folder
from kddp_ext.workflow.errors import DataFileError
from kddp_ext.workflow.read_files import read_bytes

SIZE = 28
CLASSES = 10
# Where torchvision, the authors' repository and Debian's package put the files.
_FOLDERS = ("fashion-mnist", "FashionMNIST/raw", "data/fashion", "raw")
_TRAIN, _TEST = ("train", 60_000), ("t10k", 10_000)


def read_fashion_mnist(data_dir: Path | None) -> RawDataset:
    """All of Fashion-MNIST: 60000 training and 10000 test images of 28x28 grey pixels.

    Args:
        data_dir: the folder of the four files (or one above it); without it they are downloaded once into
            the user's cache.

    Raises:
        DataFileError: a file is missing, truncated or something else; it names the file.
    """
    name = "train-images-idx3-ubyte"
    folder = find_folder(data_dir or fashion_mnist_folder(), _FOLDERS, (name, f"{name}.gz"))
    arrays = []
    for prefix, count in (_TRAIN, _TEST):
        images = read_idx(_plain_or_compressed(folder, f"{prefix}-images-idx3-ubyte"), (count, SIZE, SIZE))
        path = _plain_or_compressed(folder, f"{prefix}-labels-idx1-ubyte")
        labels = check_labels(path, read_idx(path, (count,)).astype(np.int64), CLASSES)
        arrays.append((images[..., None], labels))
    (train_images, train_labels), (test_images, test_labels) = arrays
    return RawDataset(train_images, train_labels, test_images, test_labels)


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An IDX file of bytes with exactly `shape`: a header of big-endian integers, then the values."""
    dimensions = len(shape)
    header_bytes, values = 4 * (1 + dimensions), int(np.prod(shape))
    what = f"an IDX file of {' x '.join(map(str, shape))} bytes"
    total = header_bytes + values
    # What gzip can't shrink grows by little more than its header.
    content = read_bytes(path, what, total + total // 100 + 1000)
    if path.suffix == ".gz":
        content = _decompress(path, content, what, total)

    if len(content) < header_bytes:
        raise DataFileError(path, what, f"{len(content)} bytes in all")
    magic, *found = (int(number) for number in np.frombuffer(content, ">u4", 1 + dimensions))
    # The magic number holds the type of the values (8: unsigned bytes) and the number of dimensions.
    if magic != 0x0800 + dimensions:
        raise DataFileError(path, f"{what} (magic number {0x0800 + dimensions:#06x})", f"magic number {magic:#06x}")
    if tuple(found) != shape:
        raise DataFileError(path, what, f"a header that says {' x '.join(map(str, found))}")
    if len(content) != total:
        raise DataFileError(path, f"{what} ({total} with its header)", f"{len(content)} bytes")
    array: NDArray[np.uint8] = np.frombuffer(content, np.uint8, values, header_bytes).reshape(shape).copy()
    return array  # a copy, for PyTorch wants it writable


def _decompress(path: Path, content: bytes, what: str, total: int) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            # One byte more than there should be shows a longer file without unpacking all of it.
            return file.read(total + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(path, f"{what}, compressed by gzip", f"damaged content ({error})") from error


def _plain_or_compressed(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"
