"""Downloads: checked by their hash, and unpacked without leaving their folder. Nothing here leaves this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kddp_ext.workflow.datasets import download
from kddp_ext.workflow.errors import DataFileError, WorkflowError


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_only_the_named_members_are_unpacked(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.tar.gz", (member("data/one"), b"1"), (member("../../outside"), b"2"))
    download.unpack(source, ["data/one"], tmp_path / "cache")
    assert (tmp_path / "cache" / "data" / "one").read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar.gz", "cache", "data", "one"]


NOT_REGULAR = [
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
    *(tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"),
]


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_links_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret").write_text("secret")
    source = archive(tmp_path / "a.tar.gz", (member("data/one", kind, str(tmp_path / "secret")), b""))
    with pytest.raises(DataFileError, match=r"a\.tar\.gz: expected a regular file data/one"):
        download.unpack(source, ["data/one"], tmp_path / "cache")
    assert not (tmp_path / "cache" / "data" / "one").exists()


@pytest.mark.parametrize(
    "name", ["../outside", "/outside", "data/../../outside", "data//one", "./data/one", "data/one/"]
)
def test_a_name_that_leads_elsewhere_is_not_unpacked(tmp_path: Path, name: str) -> None:
    source = archive(tmp_path / "a.tar.gz", (member(name), b"1"), (member("data/one"), b"2"))
    download.unpack(source, ["data/one"], tmp_path / "deep" / "cache")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["a.tar.gz", "deep/cache/data/one"]
    assert (tmp_path / "deep" / "cache" / "data" / "one").read_bytes() == b"2"


def test_a_link_in_front_of_a_file_leads_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    members = (member("data", tarfile.SYMTYPE, str(outside)), b""), (member("data/one"), b"1")
    download.unpack(archive(tmp_path / "a.tar.gz", *members), ["data/one"], tmp_path / "cache")
    assert not list(outside.iterdir())
    assert not (tmp_path / "cache" / "data").is_symlink()


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.99])
def test_a_truncated_archive_is_named(tmp_path: Path, share: float) -> None:
    content = np.random.default_rng(0).bytes(30_000)
    source = archive(tmp_path / "a.tar.gz", (member("data/one"), content), (member("data/two"), content))
    whole = source.read_bytes()
    source.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataFileError, match=r"a\.tar\.gz: expected"):
        download.unpack(source, ["data/one", "data/two"], tmp_path / "cache")
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(path.name == "one" and path.read_bytes() == content for path in kept)  # whole, or not there


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = member(name, kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def bomb(kind: bytes, size: int) -> bytes:
    """An archive with a member that is announced, and mostly there, but for the end."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") as file:
        file.write(header("data/one" if kind == tarfile.REGTYPE else "name", size, kind))
        for _ in range(64):
            file.write(bytes(2**20))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_bomb_takes_neither_memory_nor_disk(tmp_path: Path, kind: bytes) -> None:
    # tarfile reads an extended header or a long name whole, and writes a member of whatever size.
    source = tmp_path / "a.tar.gz"
    source.write_bytes(bomb(kind, 2**26))
    tracemalloc.start()
    with pytest.raises(DataFileError, match=r"a\.tar\.gz: expected"):
        download.unpack(source, ["data/one"], tmp_path / "cache")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_archive_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MOST_UNPACKED", 2**20)
    source = archive(tmp_path / "a.tar.gz", (member("large"), bytes(2**21)), (member("data/one"), b"1"))
    with pytest.raises(DataFileError, match=r"expected data/one within 1048576 bytes"):
        download.unpack(source, ["data/one"], tmp_path / "cache")


@pytest.mark.parametrize("size", [-1, 2**40, 2**62])
def test_a_size_that_lies(tmp_path: Path, size: int) -> None:
    source = tmp_path / "a.tar.gz"
    source.write_bytes(gzip.compress(header("data/one", size) + bytes(1024)))
    with pytest.raises(DataFileError, match=r"a\.tar\.gz: expected"):
        download.unpack(source, ["data/one"], tmp_path / "cache")
    assert not (tmp_path / "cache" / "data" / "one").exists()


def test_an_archive_without_the_file_is_named(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.tar.gz", (member("data/two"), b"2"))
    with pytest.raises(DataFileError, match=r"an archive of CIFAR-10, found .*data/one"):
        download.unpack(source, ["data/one"], tmp_path / "cache")


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What the servers hold, by URL."""
    served: dict[str, bytes] = {}

    def get(url: str, output_file: Any, _pooch: Any, **_options: Any) -> None:
        if url not in served:
            raise OSError("no connection")
        Path(output_file).write_bytes(served[url])

    monkeypatch.setattr(download, "downloader", get)
    return served


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def test_a_file_is_fetched_once(tmp_path: Path, connection: dict[str, bytes]) -> None:
    connection["https://example.org/f"] = b"content"
    for _ in range(2):
        path = download.fetch("https://example.org/f", sha256(b"content"), "f", tmp_path)
        assert path.read_bytes() == b"content"
        connection.clear()


def test_other_content_is_neither_used_nor_kept(tmp_path: Path, connection: dict[str, bytes]) -> None:
    connection["https://example.org/f"] = b"something else"
    with pytest.raises(WorkflowError, match=r"cannot download https://example\.org/f.*--data-dir"):
        download.fetch("https://example.org/f", sha256(b"content"), "f", tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_connection_the_way_out_is_named(tmp_path: Path, connection: dict[str, bytes]) -> None:
    with pytest.raises(WorkflowError, match=r"no connection.*Download it by hand and give its folder with --data-dir"):
        download.fetch("https://example.org/f", sha256(b"content"), "f", tmp_path)


def test_cifar10_is_unpacked_into_the_cache_once(
    tmp_path: Path, connection: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    source = archive(tmp_path / "made", *((member(f"cifar-10-batches-py/{name}"), b"x") for name in names))
    content = source.read_bytes()
    connection["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"] = content
    monkeypatch.setattr(download, "_CIFAR10_HASH", sha256(content))
    monkeypatch.setenv("KDDP_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        folder = download.cifar10_folder()
        assert sorted(path.name for path in (folder / "cifar-10-batches-py").iterdir()) == sorted(names)
        connection.clear()


def test_fashion_mnist_is_what_it_unpacks_to(
    tmp_path: Path, connection: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An MD5 sum can be forged."""
    cache = tmp_path / "fashion-mnist"
    right, forged = gzip.compress(b"images"), gzip.compress(b"other images")
    content = hashlib.sha256(b"images").hexdigest()
    monkeypatch.setenv("KDDP_CACHE", str(tmp_path))
    for served in (forged, b"no gzip", right[:-9], gzip.compress(bytes(2000))):
        connection[download._FASHION_URL + "f"] = served
        monkeypatch.setattr(download, "_FASHION_HASHES", {"f": ("md5:" + hashlib.md5(served).hexdigest(), content)})
        monkeypatch.setattr(download, "_MOST_UNPACKED", 1000)
        with pytest.raises(DataFileError, match="expected the content of Fashion-MNIST, found other content"):
            download.fashion_mnist_folder()
        assert not list(cache.iterdir())
    connection[download._FASHION_URL + "f"] = right
    monkeypatch.setattr(download, "_FASHION_HASHES", {"f": ("md5:" + hashlib.md5(right).hexdigest(), content)})
    for _ in range(2):
        assert (download.fashion_mnist_folder() / "f").read_bytes() == right
        connection.clear()


# A server of this machine that answers as servers should not


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Answers the next requests as the functions given do, and returns the address."""
    answers: list[Callable[[BaseHTTPRequestHandler], object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.pop(0)(self)

        def log_message(self, *_: object) -> None:
            return

    monkeypatch.setenv("NO_PROXY", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()

        def serve(*next_answers: Callable[[BaseHTTPRequestHandler], object]) -> str:
            answers[:] = next_answers
            return f"http://127.0.0.1:{running.server_port}/file"

        yield serve
        running.shutdown()
        thread.join()


CONTENT = bytes(range(256)) * 500


def answer(
    body: bytes, length: int | str | None = None, status: int = 200, **headers: str
) -> Callable[[BaseHTTPRequestHandler], object]:
    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        try:
            request.wfile.write(body)
        except OSError:  # the other side has heard enough
            request.close_connection = True

    return send


def drop(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True  # not a word


BAD_ANSWERS = {
    "other content": answer(b"something else"),
    "the first half": answer(CONTENT[: len(CONTENT) // 2]),
    "half of what is announced": answer(CONTENT[: len(CONTENT) // 2], len(CONTENT)),
    "more than is announced": answer(CONTENT + b"more", len(CONTENT) - 1),
    "one byte more": answer(CONTENT + b"x"),
    "one bit flipped": answer(bytes([CONTENT[0] ^ 1]) + CONTENT[1:]),
    "nothing": answer(b""),
    "a length that is no number": answer(CONTENT[:9], "abc"),
    "an error": answer(b"no", status=500),
    "not found": answer(CONTENT, status=404),
    "a compression that it is not": answer(CONTENT, Content_Encoding="gzip"),
    "a connection that breaks": drop,
}


@pytest.mark.parametrize("bad", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_answer_is_not_kept_and_the_next_try_starts_anew(
    tmp_path: Path, server: Callable[..., str], bad: Callable[[BaseHTTPRequestHandler], object]
) -> None:
    url = server(bad, answer(CONTENT))
    with pytest.raises(WorkflowError, match=rf"cannot download {url} into .*--data-dir"):
        download.fetch(url, sha256(CONTENT), "file", tmp_path)
    assert not list(tmp_path.iterdir())
    assert download.fetch(url, sha256(CONTENT), "file", tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_server_that_never_stops(tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MOST_DOWNLOADED", 100_000)
    url = server(answer(bytes(10_000_000)))
    with pytest.raises(WorkflowError, match="the server sent more than 100000 bytes"):
        download.fetch(url, sha256(CONTENT), "file", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_answer_that_unpacks_to_more_than_it_is(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_MOST_DOWNLOADED", 100_000)
    url = server(answer(gzip.compress(bytes(10_000_000)), Content_Encoding="gzip"))
    with pytest.raises(WorkflowError, match="the server sent more than 100000 bytes"):
        download.fetch(url, sha256(CONTENT), "file", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_download_leaves_no_file_of_that_name(
    tmp_path: Path, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server(answer(CONTENT), answer(CONTENT))

    def interrupt(_self: object, _part: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download._Limited, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(url, sha256(CONTENT), "file", tmp_path)
    assert not (tmp_path / "file").exists()
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "*")
    assert download.fetch(url, sha256(CONTENT), "file", tmp_path).read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, server: Callable[..., str]) -> None:
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    url = server(answer(CONTENT))
    assert download.fetch(url, sha256(CONTENT), "file", tmp_path).read_bytes() == CONTENT
