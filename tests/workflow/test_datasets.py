"""Data sets: valid files are read exactly, all others are refused by name, and downloads are checked by their hash."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kddp_ext.workflow import datasets
from kddp_ext.workflow.datasets import read_cifar10_batch, read_dataset, read_idx
from kddp_ext.workflow.errors import DataFileError, WorkflowError

IMAGES = 6  # of a CIFAR-10 batch


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10_BATCH_IMAGES", IMAGES)
    monkeypatch.setattr(datasets, "FASHION_MNIST_IMAGES", {"train": 20, "t10k": 10})


# CIFAR-10


def write_batch(path: Path, seed: int = 0) -> NDArray[np.uint8]:
    """Write a batch whose labels are 0 to 5; returns the colour planes of its images."""
    planes = np.random.default_rng(seed).integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(IMAGES, dtype=np.uint8)[:, None]
    path.write_bytes(np.concatenate([labels, planes.reshape(IMAGES, -1)], axis=1).tobytes())
    return planes


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    planes = [write_batch(folder / name, seed) for seed, name in enumerate(datasets._CIFAR10_BATCHES)]
    raw = read_dataset("cifar10", tmp_path)
    np.testing.assert_array_equal(raw.train_images, np.concatenate(planes[:5]).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(raw.test_images, planes[5].transpose(0, 2, 3, 1))
    assert raw.train_labels.tolist() == [*range(IMAGES)] * 5
    assert raw.test_labels.dtype == np.int64


@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_a_cifar10_batch_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    path = tmp_path / "data_batch_1.bin"
    write_batch(path)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * change if change > 0 else content[:change])
    with pytest.raises(DataFileError, match=r"data_batch_1\.bin: expected a CIFAR-10 batch of 18438 bytes"):
        read_cifar10_batch(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    write_batch(tmp_path / "data_batch_1.bin")
    with pytest.raises(DataFileError, match=r"data_batch_2\.bin: expected .*, found no such file"):
        read_dataset("cifar10", tmp_path)
    with pytest.raises(DataFileError, match="found no such folder"):
        read_dataset("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataFileError, match="none there or in cifar-10-batches-bin"):
        read_dataset("cifar10", tmp_path.parent)


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data_batch_1.bin"
    write_batch(path)

    def refuse(*_arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataFileError, match=r"data_batch_1\.bin: .* cannot be read \(Permission denied\)"):
        read_cifar10_batch(path)


# Fashion-MNIST


def idx(values: NDArray[np.uint8]) -> bytes:
    return np.array([0x0800 + values.ndim, *values.shape], ">u4").tobytes() + values.tobytes()


def images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_fashion_mnist(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images(count)), ("labels-idx1", labels)):
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(values)))


@pytest.mark.parametrize("below", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_the_four_idx_files_are_read(tmp_path: Path, below: str) -> None:
    write_fashion_mnist(tmp_path / below)
    raw = read_dataset("fashion-mnist", tmp_path)
    np.testing.assert_array_equal(raw.train_images[..., 0], images(20))
    np.testing.assert_array_equal(raw.test_images[..., 0], images(10))
    assert raw.train_labels.tolist() == [*range(10), *range(10)]
    assert raw.train_images.flags.writeable  # otherwise PyTorch warns


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found 0 bytes"),
        (b"\x00\x00\x08", "start with 000008"),
        (idx(images(3)).replace(b"\x00\x00\x08\x03", b"\x00\x00\x0d\x03", 1), "start with 00000d03"),
        (idx(images(3)[:, 0]), "start with 00000802"),
        (idx(images(2)), "start with 0000080300000002"),
        (idx(images(3))[:-1], "found 2367 bytes"),
        (idx(images(3)) + b"\x00", "found 2369 bytes"),
        (bytes(3_000_000), "found 2369 bytes"),
    ],
)
def test_another_idx_file_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataFileError, match=f"images.gz: expected an IDX file of 3 x 28 x 28 .*{found}"):
        read_idx(path, (3, 28, 28))


def test_wrong_labels_and_missing_idx_files_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(20, 12, np.uint8))))
    with pytest.raises(DataFileError, match=r"train-labels-.*\.gz: expected labels from 0 to 9, found 20 other"):
        read_dataset("fashion-mnist", tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(
        DataFileError, match=r"expected a file train-images-.*\.gz, found none there or in fashion-mnist, "
    ):
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
    "half of the announced length": answer(CONTENT[: len(CONTENT) // 2], len(CONTENT)),
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


def archive(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return buffer.getvalue()


def test_cifar10_is_downloaded_and_unpacked_once(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive([*datasets._CIFAR10_BATCHES, "batches.meta.txt"])
    monkeypatch.setattr(datasets, "_CIFAR10_URL", server(answer(content)))
    monkeypatch.setattr(datasets, "_CIFAR10_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("KDDP_CACHE", str(tmp_path))
    folder = datasets.download_cifar10()
    (folder / "data_batch_3.bin").unlink()  # as if the process had been killed
    for _ in range(2):
        assert datasets.download_cifar10() == folder
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: name for name in datasets._CIFAR10_BATCHES
        }
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-bin", "file"]


def test_fashion_mnist_is_downloaded_once(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_FASHION_MNIST_URL", server(answer(CONTENT)).removesuffix("file"))
    monkeypatch.setattr(datasets, "_FASHION_MNIST_SHA256", {"file": hashlib.sha256(CONTENT).hexdigest()})
    monkeypatch.setenv("KDDP_CACHE", str(tmp_path))
    for _ in range(2):
        assert (datasets.download_fashion_mnist() / "file").read_bytes() == CONTENT
