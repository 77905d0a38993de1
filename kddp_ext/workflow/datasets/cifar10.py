"""CIFAR-10 in either of its published layouts: the binary one, and the one for Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kddp_ext.workflow.datasets import RawDataset
from kddp_ext.workflow.datasets.cifar10_pickle import read_pickled_batch
from kddp_ext.workflow.datasets.download import cifar10_folder
from kddp_ext.workflow.datasets.files import check_labels, find_folder
from kddp_ext.workflow.errors import DataFileError
from kddp_ext.workflow.read_files import read_bytes

BATCH_IMAGES = 10_000
IMAGE_BYTES = 3 * 32 * 32
CLASSES = 10
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")

# One file's images, uint8 (10000, 3072) with the red, green and blue planes in turn, and labels.
Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read_cifar10(data_dir: Path | None) -> RawDataset:
    """All of CIFAR-10: 50000 training and 10000 test images.

    Args:
        data_dir: cifar-10-batches-py, cifar-10-batches-bin, or the folder that holds one of them; without
            it the data set is downloaded once into the user's cache.

    Raises:
        DataFileError: a file is missing, truncated or something else; it names the file.
    """
    folder = find_folder(data_dir or cifar10_folder(), _FOLDERS, ("data_batch_1", "data_batch_1.bin"))
    suffix, read = _layout(folder)
    parts = [read(folder / f"data_batch_{number}{suffix}") for number in range(1, 6)]
    test_images, test_labels = read(folder / f"test_batch{suffix}")
    return RawDataset(
        _channels_last(np.concatenate([images for images, _ in parts])),
        np.concatenate([labels for _, labels in parts]),
        _channels_last(test_images),
        test_labels,
    )


def read_binary_batch(path: Path) -> Batch:
    """One file of the binary layout: 10000 records of a label's byte and 3072 bytes of pixels."""
    record = 1 + IMAGE_BYTES
    expected = BATCH_IMAGES * record
    content = read_bytes(path, f"a CIFAR-10 batch of {expected} bytes", expected)
    if len(content) != expected:
        raise DataFileError(path, f"a CIFAR-10 batch of {expected} bytes", f"{len(content)} bytes")
    records = np.frombuffer(content, dtype=np.uint8).reshape(BATCH_IMAGES, record)
    return records[:, 1:], check_labels(path, records[:, 0].astype(np.int64), CLASSES)


def read_python_batch(path: Path) -> Batch:
    """One file of the layout for Python: a pickled dict of an array and a list."""
    images, labels = read_pickled_batch(path, BATCH_IMAGES, IMAGE_BYTES)
    return images, check_labels(path, labels, CLASSES)


def _layout(folder: Path) -> tuple[str, Callable[[Path], Batch]]:
    if (folder / "data_batch_1.bin").is_file():
        return ".bin", read_binary_batch
    return "", read_python_batch


def _channels_last(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
