"""Data sets: valid files are read exactly, all others are refused by name, and downloads are checked by their hash."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kddp_ext.workflow import datasets
from kddp_ext.workflow.datasets import read_binary_batch, read_dataset, read_idx, read_pickled_batch
from kddp_ext.workflow.errors import DataFileError, WorkflowError

IMAGES, BYTES = 6, 3072  # of a CIFAR-10 batch
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10_BATCH_IMAGES", IMAGES)
    monkeypatch.setattr(datasets, "FASHION_MNIST_IMAGES", {"train": 20, "t10k": 10})


# CIFAR-10


def batch(seed: int = 0) -> tuple[NDArray[np.uint8], list[int]]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (IMAGES, BYTES), dtype=np.uint8), random.integers(0, 10, IMAGES).tolist()


def pickled(path: Path, data: Any = None, labels: Any = None, protocol: int = 4) -> Path:
    """A pickled batch, valid except for the arguments."""
    valid_data, valid_labels = batch()
    content = {b"data": valid_data if data is None else data, b"labels": valid_labels if labels is None else labels}
    path.write_bytes(pickle.dumps({**content, b"filenames": [b"cat.png"] * IMAGES}, protocol))
    return path


def binary(path: Path, seed: int = 0) -> Path:
    data, labels = batch(seed)
    path.write_bytes(np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1).tobytes())
    return path


# Written by Python 2, as the published files are: keys and the array's bytes are str. Python 3 cannot write this.
PYTHON_2_HEAD = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\n"
    b"q\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x06"
    b"(K\x01K\x06M\x00\x0c\x86cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x48\x00\x00"
)
PYTHON_2_TAIL = b"tbU\x06labels]q\x09(K\x07K\x02K\x00K\x09K\x01K\x03eu."


def test_a_batch_written_by_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(PYTHON_2_HEAD + batch()[0].tobytes() + PYTHON_2_TAIL)
    data, labels = read_pickled_batch(path)
    np.testing.assert_array_equal(data, batch()[0])
    assert labels.tolist() == [7, 2, 0, 9, 1, 3]


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_batch_written_by_python_3_is_read(tmp_path: Path, protocol: int, order: Any) -> None:
    data, labels = read_pickled_batch(pickled(tmp_path / "b", np.asarray(batch()[0], order=order), protocol=protocol))
    np.testing.assert_array_equal(data, batch()[0])
    np.testing.assert_array_equal(labels, batch()[1])


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-10-batches-bin"])
@pytest.mark.parametrize("parent", [False, True])
def test_both_layouts_give_the_same_images(tmp_path: Path, folder: str, parent: bool) -> None:
    (tmp_path / folder).mkdir()
    for number in range(1, 7):
        path = tmp_path / folder / (f"data_batch_{number}" if number < 6 else "test_batch")
        if folder.endswith("bin"):
            binary(path.with_suffix(".bin"), number)
        else:
            pickled(path, *batch(number))
    raw = read_dataset("cifar10", tmp_path if parent else tmp_path / folder)
    assert raw.train_images.shape == (5 * IMAGES, 32, 32, 3)
    assert raw.test_images.shape == (IMAGES, 32, 32, 3)
    data, labels = batch(2)
    second = slice(IMAGES, 2 * IMAGES)
    np.testing.assert_array_equal(raw.train_images[second], data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(raw.train_labels[second], labels)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"data": np.zeros((2, 2), object)}, "expected uint8"),
        ({"data": np.zeros((2, 2), np.float32)}, "expected uint8"),
        ({"data": np.zeros((IMAGES, BYTES - 1), np.uint8)}, "expected data as an array of uint8 (6, 3072)"),
        ({"data": "pixels"}, "found a str"),
        ({"labels": [0] * (IMAGES - 1)}, "expected 6 labels, found 5"),
        ({"labels": [0] * (IMAGES - 1) + [10]}, "labels from 0 to 9, found 1 other labels, the first 10"),
        ({"labels": [-1] * IMAGES}, "labels as a list of integers"),
        ({"labels": [0.5] * IMAGES}, "labels as a list of integers"),
        ({"labels": [True] * IMAGES}, "labels as a list of integers"),
        ({"labels": "012345"}, "found a str"),
        ({"data": np.zeros((IMAGES, BYTES), np.uint8), "protocol": 2}, "the pickle names _codecs.encode"),
    ],
)
def test_another_pickle_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    path = pickled(tmp_path / "data_batch_1", **changes)
    with pytest.raises(DataFileError) as caught:
        read_pickled_batch(path)
    assert str(caught.value).startswith(f"{path}: expected ")
    assert found in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({b"data": 1})])
def test_a_file_that_is_no_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match="data_batch_1: expected a pickled CIFAR-10 batch"):
        read_pickled_batch(path)


@same_folder
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), tail=st.booleans())
def test_a_corrupted_pickle_is_refused_or_read_as_a_batch(
    tmp_path: Path, position: float, value: int, tail: bool
) -> None:
    path = pickled(tmp_path / "data_batch_1")
    content = bytearray(path.read_bytes())
    place = int(position * 200)  # most bytes are pixels; the opcodes are at both ends
    content[-1 - place if tail else place] = value
    path.write_bytes(content)
    with contextlib.suppress(DataFileError):  # and no other error
        data, labels = read_pickled_batch(path)
        assert (data.shape, data.dtype, labels.shape) == ((IMAGES, BYTES), np.uint8, (IMAGES,))
        assert 0 <= labels.min() <= labels.max() < 10


@pytest.mark.parametrize("change", [-1, 1, -BYTES - 1])
def test_a_binary_batch_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    path = binary(tmp_path / "data_batch_1.bin")
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * change if change > 0 else content[:change])
    with pytest.raises(DataFileError, match=r"data_batch_1\.bin: expected a CIFAR-10 batch of 18438 bytes"):
        read_binary_batch(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    binary(tmp_path / "data_batch_1.bin")
    with pytest.raises(DataFileError, match=r"data_batch_2\.bin: expected .*, found no such file"):
        read_dataset("cifar10", tmp_path)
    with pytest.raises(DataFileError, match="found no such folder"):
        read_dataset("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataFileError, match="none there or in cifar-10-batches-py"):
        read_dataset("cifar10", tmp_path.parent)


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = binary(tmp_path / "data_batch_1.bin")

    def refuse(*_arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataFileError, match=r"data_batch_1\.bin: .* cannot be read \(Permission denied\)"):
        read_binary_batch(path)


# Fashion-MNIST


def idx(values: NDArray[np.uint8]) -> bytes:
    return np.array([0x0800 + values.ndim, *values.shape], ">u4").tobytes() + values.tobytes()


def images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_fashion_mnist(folder: Path, compressed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images(count)), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(idx(values)) if compressed else idx(values))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("below", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_the_four_idx_files_are_read(tmp_path: Path, compressed: bool, below: str) -> None:
    write_fashion_mnist(tmp_path / below, compressed)
    raw = read_dataset("fashion-mnist", tmp_path)
    np.testing.assert_array_equal(raw.train_images[..., 0], images(20))
    np.testing.assert_array_equal(raw.test_images[..., 0], images(10))
    assert raw.train_labels.tolist() == [*range(10), *range(10)]
    assert raw.train_images.flags.writeable  # otherwise PyTorch warns


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found nothing"),
        (b"\x00\x00\x08", "found 000008"),
        (idx(images(3)).replace(b"\x00\x00\x08\x03", b"\x00\x00\x0d\x03", 1), "found 00000d03"),
        (idx(images(3)[:, 0]), "found 00000802"),
        (idx(images(2)), "found 0000080300000002"),
        (idx(images(3))[:-1], "found 2367 bytes"),
        (idx(images(3)) + b"\x00", "found 2369 bytes"),
        (bytes(3_000_000), "found "),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_another_idx_file_is_refused(tmp_path: Path, content: bytes, found: str, compressed: bool) -> None:
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataFileError, match=f"{path.name}: expected an IDX file of 3 x 28 x 28 .*{found}"):
        read_idx(path, (3, 28, 28))


@same_folder
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_gzip_file_is_refused_or_read_exactly(tmp_path: Path, share: float, flip: int, cut: bool) -> None:
    path = tmp_path / "images.gz"
    content = bytearray(gzip.compress(idx(images(3))))
    place = int(share * len(content))
    content[place] ^= flip
    path.write_bytes(content[:place] if cut else content)
    with contextlib.suppress(DataFileError):  # and no other error
        values = read_idx(path, (3, 28, 28))
        assert not cut
        np.testing.assert_array_equal(values, images(3))  # the changed byte was an unused one of the header


def test_wrong_labels_and_missing_idx_files_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(20, 12, np.uint8)))
    with pytest.raises(DataFileError, match="train-labels-idx1-ubyte: expected labels from 0 to 9, found 20 other"):
        read_dataset("fashion-mnist", tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(DataFileError, match=r"expected a file train-images-idx3-ubyte or"):
        read_dataset("fashion-mnist", tmp_path)


def test_digits_are_split_into_1200_and_597_images() -> None:
    raw = read_dataset("digits", None)
    assert raw.train_images.shape == (1200, 8, 8, 1)
    assert raw.test_images.shape == (597, 8, 8, 1)
    assert raw.train_images.max() == 255
    assert sorted(set(raw.test_labels)) == list(range(10))


# Downloads, from a server on this machine

Answer = Callable[[BaseHTTPRequestHandler], object]
CONTENT = bytes(range(256)) * 500


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Gives the next requests the given answers, and returns the address. Without answers it drops connections."""
    answers: list[Answer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            (answers.pop(0) if answers else drop)(self)

        def log_message(self, *_: object) -> None:
            return

    monkeypatch.setenv("NO_PROXY", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()

        def serve(*next_answers: Answer) -> str:
            answers[:] = next_answers
            return f"http://127.0.0.1:{running.server_port}/file"

        yield serve
        running.shutdown()
        thread.join()


def answer(body: bytes, length: int | str | None = None, status: int = 200) -> Answer:
    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        request.wfile.write(body)

    return send


def drop(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True


def download(url: str, content: bytes, folder: Path) -> bytes:
    datasets.download(url, hashlib.sha256(content).hexdigest(), folder)
    return (folder / "file").read_bytes()


BAD_ANSWERS = {
    "other content": answer(b"something else"),
    "half of the content": answer(CONTENT[: len(CONTENT) // 2]),
    "half of the announced length": answer(CONTENT[: len(CONTENT) // 2], len(CONTENT)),
    "more than the announced length": answer(CONTENT + b"more", len(CONTENT) - 1),
    "one bit flipped": answer(bytes([CONTENT[0] ^ 1]) + CONTENT[1:]),
    "nothing": answer(b""),
    "a length that is not a number": answer(CONTENT[:9], "abc"),
    "an error": answer(b"no", status=500),
    "a dropped connection": drop,
}


@pytest.mark.parametrize("bad", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_answer_is_not_kept_and_the_next_try_succeeds(
    tmp_path: Path, server: Callable[..., str], bad: Answer
) -> None:
    url = server(bad, answer(CONTENT))
    with pytest.raises(WorkflowError, match=rf"cannot download {url} into .*Download it by hand.*--data-dir"):
        download(url, CONTENT, tmp_path)
    assert not list(tmp_path.iterdir())
    assert download(url, CONTENT, tmp_path) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_in_the_cache_is_used_and_a_damaged_one_replaced(tmp_path: Path, server: Callable[..., str]) -> None:
    url = server(answer(CONTENT))
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    for _ in range(2):  # the server has one answer
        assert download(url, CONTENT, tmp_path) == CONTENT


def test_an_interrupted_download_leaves_no_file(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server(answer(CONTENT), answer(CONTENT))

    def interrupt(source: BinaryIO, target: BinaryIO) -> None:
        target.write(source.read(1000))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download(url, CONTENT, tmp_path)
    assert not (tmp_path / "file").exists()
    assert download(url, CONTENT, tmp_path) == CONTENT


def archive(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return buffer.getvalue()


def test_cifar10_is_downloaded_and_unpacked_once(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive([*datasets._CIFAR10_BATCHES, "batches.meta"])
    monkeypatch.setattr(datasets, "_CIFAR10_URL", server(answer(content)))
    monkeypatch.setattr(datasets, "_CIFAR10_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("KDDP_CACHE", str(tmp_path))
    folder = datasets.download_cifar10()
    (folder / "data_batch_3").unlink()  # as if the process had been killed
    for _ in range(2):
        assert datasets.download_cifar10() == folder
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: name for name in datasets._CIFAR10_BATCHES
        }
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py", "file"]


def test_fashion_mnist_is_downloaded_once(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_FASHION_MNIST_URL", server(answer(CONTENT)).removesuffix("file"))
    monkeypatch.setattr(datasets, "_FASHION_MNIST_SHA256", {"file": hashlib.sha256(CONTENT).hexdigest()})
    monkeypatch.setenv("KDDP_CACHE", str(tmp_path))
    for _ in range(2):
        assert (datasets.download_fashion_mnist() / "file").read_bytes() == CONTENT
