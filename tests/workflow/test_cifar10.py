"""Both layouts of CIFAR-10: what is read, and that nothing else is."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kddp_ext.workflow.datasets import cifar10, read_dataset
from kddp_ext.workflow.datasets.cifar10 import read_binary_batch, read_cifar10, read_python_batch
from kddp_ext.workflow.datasets.cifar10_pickle import read_pickled_batch
from kddp_ext.workflow.errors import DataFileError

IMAGES, BYTES = 6, 3072
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def batch(seed: int = 0) -> tuple[NDArray[np.uint8], list[int]]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (IMAGES, BYTES), dtype=np.uint8), random.integers(0, 10, IMAGES).tolist()


def write_pickle(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_batch(path: Path, seed: int = 0, protocol: int = 2) -> Path:
    data, labels = batch(seed)
    return write_pickle(path, {b"data": data, b"labels": labels, b"filenames": [b"cat.png"] * IMAGES}, protocol)


def write_binary(path: Path, seed: int = 0) -> Path:
    data, labels = batch(seed)
    path.write_bytes(np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1).tobytes())
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "BATCH_IMAGES", IMAGES)


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickled_batch_is_read_whatever_its_protocol(tmp_path: Path, protocol: int) -> None:
    data, labels = read_pickled_batch(write_batch(tmp_path / "b", protocol=protocol), IMAGES, BYTES)
    expected, expected_labels = batch()
    np.testing.assert_array_equal(data, expected)
    np.testing.assert_array_equal(labels, expected_labels)


# How Python 2 wrote them: str keys, and the array's bytes as a str. Opcodes by hand, for no Python 3 writes this.
PYTHON_2_HEAD = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\n"
    b"q\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x06"
)
PYTHON_2_STATE = (
    b"(K\x01K\x02K\x04\x86cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
)
PYTHON_2_TAIL = b"tbU\x06labels]q\x09(K\x07K\x02eu."


def test_a_batch_written_by_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(PYTHON_2_HEAD + PYTHON_2_STATE + bytes(range(248, 256)) + PYTHON_2_TAIL)
    data, labels = read_pickled_batch(path, 2, 4)
    np.testing.assert_array_equal(data, np.arange(248, 256, dtype=np.uint8).reshape(2, 4))
    assert labels.tolist() == [7, 2]


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-10-batches-bin"])
@pytest.mark.parametrize("parent", [False, True])
def test_both_layouts_give_the_same_images(tmp_path: Path, folder: str, parent: bool) -> None:
    place = tmp_path / folder
    place.mkdir()
    for number in range(1, 7):
        name = f"data_batch_{number}" if number < 6 else "test_batch"
        if folder.endswith("bin"):
            write_binary(place / f"{name}.bin", number)
        else:
            write_batch(place / name, number)
    raw = read_cifar10(tmp_path if parent else place)
    assert raw.train_images.shape == (5 * IMAGES, 32, 32, 3)
    assert raw.test_images.shape == (IMAGES, 32, 32, 3)
    data, labels = batch(2)
    np.testing.assert_array_equal(
        raw.train_images[IMAGES : 2 * IMAGES], data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    )
    np.testing.assert_array_equal(raw.train_labels[IMAGES : 2 * IMAGES], labels)


class Command:
    """What an attacker would put into a pickle."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_names_anything_else_is_not_run(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made by the pickle"
    path = write_pickle(tmp_path / "data_batch_1", {b"data": Command(os.mkdir, str(made)), b"labels": []}, protocol)
    with pytest.raises(DataFileError, match=r"data_batch_1: expected .* found the global (posix|nt)\.mkdir"):
        read_python_batch(path)
    assert not made.exists()


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((IMAGES, BYTES), object),
        np.zeros((IMAGES, BYTES), np.float32),
        np.zeros((IMAGES, BYTES - 1), np.uint8),
        np.zeros((IMAGES + 1, BYTES), np.uint8),
        "pixels",
    ],
)
def test_other_data_is_refused(tmp_path: Path, data: object) -> None:
    path = write_pickle(tmp_path / "data_batch_1", {b"data": data, b"labels": [0] * IMAGES})
    with pytest.raises(DataFileError, match="data_batch_1: expected"):
        read_python_batch(path)


@pytest.mark.parametrize(
    "labels",
    [
        [0] * (IMAGES - 1),
        [0] * (IMAGES - 1) + [10],
        [-1] * IMAGES,
        [0.5] * IMAGES,
        [2**70] * IMAGES,
        "012345",
        [True] * IMAGES,
    ],
)
def test_other_labels_are_refused(tmp_path: Path, labels: object) -> None:
    path = write_pickle(tmp_path / "data_batch_1", {b"data": batch()[0], b"labels": labels})
    with pytest.raises(DataFileError, match="data_batch_1: expected"):
        read_python_batch(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({b"data": 1})])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match="data_batch_1: expected"):
        read_python_batch(path)


@same_folder
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_pickle_is_refused(tmp_path: Path, share: float) -> None:
    path = write_batch(tmp_path / "data_batch_1")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataFileError, match="data_batch_1: expected"):
        read_python_batch(path)


@same_folder
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), tail=st.booleans())
def test_a_corrupted_pickle_is_read_or_refused(tmp_path: Path, position: float, value: int, tail: bool) -> None:
    path = write_batch(tmp_path / "data_batch_1")
    content = bytearray(path.read_bytes())
    # Most bytes are pixels; the program of the pickle is in the few at both ends.
    place = int(position * 200)
    content[-1 - place if tail else place] = value
    path.write_bytes(content)
    with contextlib.suppress(DataFileError):  # and no other error
        data, labels = read_python_batch(path)
        assert data.shape == (IMAGES, BYTES)
        assert data.dtype == np.uint8
        assert labels.shape == (IMAGES,)
        assert 0 <= labels.min() <= labels.max() < 10


@pytest.mark.parametrize("change", [-1, 1, -BYTES - 1])
def test_a_binary_batch_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    path = write_binary(tmp_path / "data_batch_1.bin")
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * change if change > 0 else content[:change])
    with pytest.raises(DataFileError, match=r"data_batch_1\.bin: expected a CIFAR-10 batch of 18438 bytes"):
        read_binary_batch(path)


def test_a_binary_batch_with_a_foreign_label_is_refused(tmp_path: Path) -> None:
    path = write_binary(tmp_path / "data_batch_1.bin")
    content = bytearray(path.read_bytes())
    content[BYTES + 1] = 10
    path.write_bytes(content)
    with pytest.raises(DataFileError, match="expected labels from 0 to 9, found 1 others, the first 10"):
        read_binary_batch(path)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    write_binary(tmp_path / "data_batch_1.bin")
    with pytest.raises(DataFileError, match=r"data_batch_2\.bin: expected .*, found no such file"):
        read_cifar10(tmp_path)
    with pytest.raises(DataFileError, match="found no such folder"):
        read_dataset("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataFileError, match="neither there nor in cifar-10-batches-py"):
        read_dataset("cifar10", tmp_path.parent)
