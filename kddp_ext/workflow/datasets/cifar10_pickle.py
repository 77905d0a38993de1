"""CIFAR-10's pickled batches, read by an unpickler that can build an array and nothing else.

A pickle is a program: plain `pickle.load` runs whatever a file names. Those files were written by Python 2
and name three things of NumPy (and, when they were saved again by Python 3, `_codecs.encode`); only these
are admitted here, and each through a stand-in that refuses unusual arguments.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kddp_ext.workflow.datasets.files import read_bytes
from kddp_ext.workflow.errors import DataFileError

# The real files have 31.04 MB; what is much longer is something else.
_MOST_BYTES = 40_000_000

_rebuild_array: Any = np.empty(0).__reduce__()[0]


def read_pickled_batch(path: Path, images: int, image_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The pixels, uint8 (images, image_bytes), and labels, int64 (images,), of one pickled batch.

    Raises:
        DataFileError: the file is missing, truncated, names anything but NumPy's arrays, or holds arrays of
            another shape or type.
    """
    what = "a pickled CIFAR-10 batch"
    content = read_bytes(path, what, _MOST_BYTES)
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _UnexpectedGlobalError as error:
        raise DataFileError(path, f"{what} that names NumPy's arrays alone", str(error)) from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise DataFileError(path, what, f"damaged content ({type(error).__name__}: {error})") from error

    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise DataFileError(path, f"{what}, a dict with data and labels", _describe(batch))
    data, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (images, image_bytes):
        raise DataFileError(path, f"data as an array of uint8 ({images}, {image_bytes})", _describe(data))
    if not isinstance(labels, list) or len(labels) != images or not all(type(label) is int for label in labels):
        raise DataFileError(path, f"labels as a list of {images} integers", _describe(labels))
    try:
        return data, np.asarray(labels, dtype=np.int64)
    except OverflowError as error:
        raise DataFileError(path, "labels of 64 bits", "a larger number") from error


class _UnexpectedGlobalError(Exception):
    """The pickle names something that these files do not need."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _plain_dtype,
            ("_codecs", "encode"): _encode_latin1,
        }
        try:
            return admitted[module, name]
        except KeyError:
            raise _UnexpectedGlobalError(f"the global {module}.{name}") from None


def _empty_array(kind: object, shape: object, code: object) -> Any:
    # NumPy pickles every array as an empty one whose state then follows.
    if kind is not np.ndarray or shape != (0,):
        raise _UnexpectedGlobalError(f"an array started as {kind}, {shape}")
    return _rebuild_array(np.ndarray, (0,), code)


def _plain_dtype(code: object, *flags: object) -> Any:
    if code not in (b"u1", "u1"):
        raise _UnexpectedGlobalError(f"an array of dtype {code!r}")
    return np.dtype("u1")


def _encode_latin1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise _UnexpectedGlobalError(f"a text encoded as {encoding!r}")
    return text.encode("latin1")


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(sorted(map(str, value)))[:80]}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"
