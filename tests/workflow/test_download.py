"""Downloads: checked by their hash, and unpacked without leaving their folder. Nothing here uses the network."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_links_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret").write_text("secret")
    source = archive(tmp_path / "a.tar.gz", (member("data/one", kind, str(tmp_path / "secret")), b""))
    with pytest.raises(DataFileError, match=r"a\.tar\.gz: expected a regular file data/one"):
        download.unpack(source, ["data/one"], tmp_path / "cache")
    assert not (tmp_path / "cache" / "data" / "one").exists()


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.tar.gz", (member("data/one"), bytes(range(256)) * 100))
    source.write_bytes(source.read_bytes()[:200])
    with pytest.raises(DataFileError, match=r"a\.tar\.gz: expected"):
        download.unpack(source, ["data/one"], tmp_path / "cache")


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
