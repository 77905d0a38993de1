"""The data sets: downloading them, and reading their files. Every file is checked as if a stranger had written it."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import pickletools
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pooch
from numpy.typing import NDArray
from rich.progress import wrap_file

from kddp_ext.workflow.config import Dataset
from kddp_ext.workflow.errors import DataFileError, WorkflowError


@dataclass(frozen=True)
class DatasetInfo:
    """What networks and reports must know of a data set; a student's file contains it.

    Images are square, with sides of `size` pixels and 1 (grey) or 3 `channels`. `mean` and `std` are those of the
    training pixels, for each channel, on the scale 0 to 255. `flips` says whether a mirrored image still shows its
    class, so that augmentation may flip it.
    """

    name: str
    size: int
    channels: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool = True

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @classmethod
    def from_json(cls, values: Any) -> DatasetInfo:
        """Rebuild the JSON object that `dataclasses.asdict` becomes; raises ValueError if it is anything else."""
        try:
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
            }
            info = cls(**fields)
            names, numbers = info.class_names, (*info.mean, *info.std)
            valid = (
                all(isinstance(name, str) for name in (info.name, *names))
                and len(names) > 1
                and isinstance(info.size, int)
                and 0 < info.size <= LARGEST_SIZE
                and info.channels in (1, 3)
                and len(info.mean) == len(info.std) == info.channels
                and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
                and min(info.std) > 0
            )
        except (AttributeError, TypeError) as error:
            raise ValueError(f"it does not describe a data set: {error}") from error
        if not valid:
            raise ValueError("it does not describe a data set: a field has another type or size than expected")
        return info


@dataclass(frozen=True)
class RawDataset:
    """Images, uint8 (N, size, size, channels), and labels, int64 (N,), of the training and the test split.

    The rows say which images belong to a split; None: all of them, and for validation none of its own. So several
    splits can share one array that is mapped into memory.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    train_rows: NDArray[np.int64] | None = None
    validation_rows: NDArray[np.int64] | None = None
    test_rows: NDArray[np.int64] | None = None


LARGEST_SIZE = 4096  # pixels
_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Of a folder of images, `read_image_folder` returns it.
INFO: dict[Dataset, DatasetInfo] = {
    "digits": DatasetInfo("digits", 8, 1, _DIGITS, (77.8,), (95.9,), flips=False),
    "fashion-mnist": DatasetInfo("Fashion-MNIST", 28, 1, _CLOTHES, (72.9,), (90.0,)),
    "cifar10": DatasetInfo("CIFAR-10", 32, 3, _CIFAR10_CLASSES, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
}


def read_dataset(dataset: Dataset, data_dir: Path | None) -> RawDataset:
    """Read a data set of `INFO` from `data_dir` or its usual folder below, or from a cache, which downloads it once.

    Raises:
        DataFileError: a file is missing, truncated or has other content than expected. The message names it.
        WorkflowError: the download failed.
    """
    if dataset == "digits":
        return read_digits()
    if dataset == "fashion-mnist":
        return read_fashion_mnist(data_dir or download_fashion_mnist())
    return read_cifar10(data_dir or download_cifar10())


# Digits: 1797 scanned digits of 8x8 pixels, from the UCI repository

_DIGITS_TEST_IMAGES = 597  # a third; in a smaller test set, one image would weigh more than the reported differences


def read_digits() -> RawDataset:
    """The digits that come with scikit-learn. The split is the same for every seed."""
    from sklearn.datasets import load_digits  # takes a second

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)  # stored as 0 to 16
    labels = labels.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:_DIGITS_TEST_IMAGES], order[_DIGITS_TEST_IMAGES:]
    return RawDataset(pixels[train], labels[train], pixels[test], labels[test])


# Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): four IDX files, compressed or not

FASHION_MNIST_IMAGES = {"train": 60_000, "t10k": 10_000}
# Where torchvision, the authors' repository and Debian's package put the files.
_FASHION_MNIST_FOLDERS = ("fashion-mnist", "FashionMNIST/raw", "data/fashion", "raw")


def read_fashion_mnist(data_dir: Path) -> RawDataset:
    """Fashion-MNIST: 60000 training and 10000 test images of 28x28 grey pixels. Raises as `read_dataset` does."""
    name = "train-images-idx3-ubyte"
    folder = _find_folder(data_dir, _FASHION_MNIST_FOLDERS, (name, f"{name}.gz"))
    arrays: list[Any] = []
    for split, count in FASHION_MNIST_IMAGES.items():
        images, labels = (_plain_or_gz(folder / f"{split}-{part}-ubyte") for part in ("images-idx3", "labels-idx1"))
        arrays += [read_idx(images, (count, 28, 28))[..., None], _check_labels(labels, read_idx(labels, (count,)))]
    return RawDataset(*arrays)


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an IDX file of bytes that has exactly `shape`: a header of big-endian integers, then the values."""
    expected = f"an IDX file of {' x '.join(map(str, shape))} bytes"
    header = np.array([0x0800 + len(shape), *shape], ">u4").tobytes()  # 0x08 is the code of unsigned bytes
    size = len(header) + int(np.prod(shape))
    content = _read_file(path, expected, size + size // 100 + 1000)  # gzip adds little to incompressible content
    if path.suffix == ".gz":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(size + 1)  # one byte more reveals a longer file without unpacking all of it
        except (OSError, EOFError, zlib.error) as error:
            raise DataFileError(path, f"{expected}, compressed by gzip", f"damaged content ({error})") from error
    if not content.startswith(header):
        found = content[: len(header)].hex() or "nothing"
        raise DataFileError(path, f"{expected}, with the header {header.hex()}", found)
    if len(content) != size:
        raise DataFileError(path, f"{expected}, {size} with its header", f"{len(content)} bytes")
    values: NDArray[np.uint8] = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape).copy()
    return values  # a copy, because PyTorch needs writable memory


def _plain_or_gz(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


# CIFAR-10 (Krizhevsky 2009), in its binary layout or as pickles for Python

CIFAR10_BATCH_IMAGES = 10_000
_CIFAR10_IMAGE_BYTES = 3 * 32 * 32  # the red, the green and the blue plane
_CIFAR10_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_CIFAR10_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def read_cifar10(data_dir: Path) -> RawDataset:
    """CIFAR-10: 50000 training and 10000 test images of 32x32 colour pixels. Raises as `read_dataset` does."""
    folder = _find_folder(data_dir, _CIFAR10_FOLDERS, ("data_batch_1", "data_batch_1.bin"))
    binary = (folder / "data_batch_1.bin").is_file()
    batches = [
        read_binary_batch(folder / f"{name}.bin") if binary else read_pickled_batch(folder / name)
        for name in _CIFAR10_BATCHES
    ]
    images = [np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)) for planes, _ in batches]
    labels = [labels for _, labels in batches]
    return RawDataset(np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5])


def read_binary_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the pixels, uint8 (10000, 3072), and labels of a binary batch: records of a label byte and the pixels."""
    record = 1 + _CIFAR10_IMAGE_BYTES
    size = CIFAR10_BATCH_IMAGES * record
    content = _read_file(path, f"a CIFAR-10 batch of {size} bytes", size)
    if len(content) != size:
        raise DataFileError(path, f"a CIFAR-10 batch of {size} bytes", f"{len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(CIFAR10_BATCH_IMAGES, record)
    return records[:, 1:], _check_labels(path, records[:, 0])


def read_pickled_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the pixels, uint8 (10000, 3072), and labels of a pickled batch. Nothing that the pickle names is called."""
    expected = "a pickled CIFAR-10 batch"
    most = CIFAR10_BATCH_IMAGES * (_CIFAR10_IMAGE_BYTES + 300) + 4096  # 300 bytes for a label and a file name
    content = _read_file(path, expected, most)
    try:
        _check_opcodes(content)
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], batch[b"labels"]
    except Exception as error:  # a damaged pickle can raise any kind of exception
        raise DataFileError(path, f"{expected}, a dict with data and labels", repr(error)[:200]) from error
    shape = (CIFAR10_BATCH_IMAGES, _CIFAR10_IMAGE_BYTES)
    if not isinstance(data, np.ndarray) or data.shape != shape:
        raise DataFileError(path, f"data as an array of uint8 {shape}", f"a {type(data).__name__}")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataFileError(path, "labels as a list of integers", f"a {type(labels).__name__} of something else")
    if len(labels) != len(data):
        raise DataFileError(path, f"{len(data)} labels", f"{len(labels)}")
    return data, _check_labels(path, np.array(labels, np.uint8))


class _BatchUnpickler(pickle.Unpickler):
    """Knows the three names that a pickled array of bytes uses, each by a stand-in, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {"multiarray._reconstruct": _empty_array, "numpy.ndarray": None, "numpy.dtype": _uint8}
        full_name = f"{module}.{name}"
        known = full_name.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if known not in stand_ins:
            raise pickle.UnpicklingError(f"the pickle names {full_name}")
        return stand_ins[known]


def _empty_array(*_arguments: Any) -> NDArray[np.uint8]:
    return np.empty(0, np.uint8)  # its state, which follows in the pickle, has the shape and the bytes


def _uint8(code: Any, *_arguments: Any) -> np.dtype[np.uint8]:
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"the pickle has an array of {code!r}; expected uint8")
    return np.dtype(np.uint8)


def _check_opcodes(content: bytes) -> None:
    """Raise UnpicklingError or ValueError before a hostile pickle can take much memory or overflow the stack.

    The unpickler makes its memo as long as the largest index, and hashes nested tuples without a limit.
    """
    tuples = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        tuples += "TUPLE" in opcode.name
        if tuples > 16 or ("PUT" in opcode.name and int(argument or 0) > number):
            raise pickle.UnpicklingError("the pickle has more tuples, or larger memo indices, than a batch needs")


# Files


def _read_file(path: Path, expected: str, most: int) -> bytes:
    """Read a regular file of at most `most` bytes."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # reading a pipe or a device may never end
            raise DataFileError(path, expected, "something that is not a regular file")
        if state.st_size > most:
            raise DataFileError(path, f"{expected} of at most {most} bytes", f"{state.st_size} bytes")
        with path.open("rb") as file:
            return file.read(state.st_size)
    except FileNotFoundError as error:
        raise DataFileError(path, expected, "no such file") from error
    except OSError as error:
        raise DataFileError(path, expected, f"a file that cannot be read ({error.strerror})") from error


def _find_folder(data_dir: Path, subfolders: Sequence[str], names: Sequence[str]) -> Path:
    """The first of `data_dir` and its `subfolders` that has a file with one of the `names`."""
    for folder in (data_dir, *(data_dir / name for name in subfolders)):
        if any((folder / name).is_file() for name in names):
            return folder
    found = "no such folder" if not data_dir.is_dir() else f"none there or in {', '.join(subfolders)}"
    raise DataFileError(data_dir, f"a file {' or '.join(names)}", found)


def _check_labels(path: Path, labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The labels as int64. All three data sets have ten classes."""
    wrong = labels[labels > 9]
    if wrong.size:
        raise DataFileError(path, "labels from 0 to 9", f"{wrong.size} other labels, the first {wrong[0]}")
    return labels.astype(np.int64)


# Downloads

_TIMEOUT = 30  # seconds without any data
_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


def download_fashion_mnist() -> Path:
    """The folder in the cache that has Fashion-MNIST's four files (31 MB). Raises WorkflowError if it cannot be had."""
    folder = _cache_folder() / "fashion-mnist"
    for name, sha256 in _FASHION_MNIST_SHA256.items():
        download(_FASHION_MNIST_URL + name, sha256, folder)
    return folder


def download_cifar10() -> Path:
    """The folder in the cache that has CIFAR-10's batches (170 MB). Raises WorkflowError if it cannot be had."""
    cache = _cache_folder()
    folder = cache / "cifar-10-batches-py"
    if all((folder / name).is_file() for name in _CIFAR10_BATCHES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # Unpacked elsewhere and renamed, so that a process that is killed leaves no incomplete batch.
    with tempfile.TemporaryDirectory(prefix=".cifar10.", dir=cache) as unpacked:
        download(_CIFAR10_URL, _CIFAR10_SHA256, cache, pooch.Untar(extract_dir=Path(unpacked).name))
        for name in _CIFAR10_BATCHES:
            os.replace(Path(unpacked) / folder.name / name, folder / name)
    return folder


def download(url: str, sha256: str, folder: Path, processor: Callable[..., Any] | None = None) -> None:
    """Download `url` into `folder` unless it is there, check its hash, then apply pooch's `processor`."""
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(url, sha256, url.rpartition("/")[2], folder, processor, _fetch)
    except (OSError, ValueError, HTTPException) as error:
        raise WorkflowError(
            f"cannot download {url} into {folder}: {error}. Download it by hand and name its folder with --data-dir."
        ) from error


def _fetch(url: str, path: str, _caller: object) -> None:
    """The downloader for pooch, with a bar."""
    with urlopen(url, timeout=_TIMEOUT) as response, open(path, "wb") as file:
        length = int(response.headers.get("Content-Length", 0))
        with wrap_file(response, length, description=f"downloading {url}", transient=True) as content:
            shutil.copyfileobj(content, file)


def _cache_folder() -> Path:
    return Path(os.environ.get("KDDP_CACHE") or pooch.os_cache("kddp_ext"))
