"""CIFAR-10's pickled batches: pixels and labels, from a reader of pickles that runs nothing (array_pickle.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kddp_ext.workflow.datasets.array_pickle import PickleError, read_array_pickle
from kddp_ext.workflow.errors import DataFileError
from kddp_ext.workflow.read_files import read_bytes

# Of an image: Python 2 writes a byte in up to 4 characters in protocol 0; and a label and a file's name.
_BYTES_PER_PIXEL, _BYTES_PER_IMAGE, _BYTES_PER_FILE = 4, 300, 4096
# Instructions: 12 an image in protocol 0, for its label and its file's name; fewer in the others.
_STEPS_PER_IMAGE, _STEPS_PER_FILE = 20, 1000


def read_pickled_batch(path: Path, images: int, image_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The pixels, uint8 (images, image_bytes), and labels, int64 (images,), of one pickled batch.

    Raises:
        DataFileError: the file is missing, truncated, names anything but NumPy's arrays, or holds arrays of
            another shape or type.
    """
    what = "a pickled CIFAR-10 batch"
    most = images * (image_bytes * _BYTES_PER_PIXEL + _BYTES_PER_IMAGE) + _BYTES_PER_FILE
    content = read_bytes(path, what, most)
    try:
        batch = read_array_pickle(content, images * _STEPS_PER_IMAGE + _STEPS_PER_FILE)
    except PickleError as error:
        raise DataFileError(path, f"{what} of NumPy's arrays, lists and texts alone", str(error)) from error

    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise DataFileError(path, f"{what}, a dict with data and labels", _describe(batch))
    data, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(data, np.ndarray) or data.shape != (images, image_bytes):
        raise DataFileError(path, f"data as an array of uint8 ({images}, {image_bytes})", _describe(data))
    if not isinstance(labels, list) or len(labels) != images or not all(type(label) is int for label in labels):
        raise DataFileError(path, f"labels as a list of {images} integers", _describe(labels))
    try:
        return data, np.asarray(labels, dtype=np.int64)
    except OverflowError as error:
        raise DataFileError(path, "labels of 64 bits", "a larger number") from error


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(sorted(repr(key[:20]) for key in value))[:80]}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"
