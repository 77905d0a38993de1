"""Downloads with a hash check into the user's cache, and unpacking that stays in its folder."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import IO, Any

import pooch
from rich.progress import Progress

from kddp_ext.files import atomic_write
from kddp_ext.workflow.errors import DataFileError, WorkflowError

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
_CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR10_HASH = "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")

_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# Its publisher gives no HTTPS, and MD5 sums of the files (zalandoresearch/fashion-mnist, README), which can be forged.
# The SHA-256 is of what they unpack to, as Debian's package dataset-fashion-mnist has it.
_FASHION_HASHES = {
    "train-images-idx3-ubyte.gz": (
        "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte.gz": (
        "md5:25c81989df183df01b3e8a0aad5dffbe",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte.gz": (
        "md5:bef4ecab320f06d8554ea6380940ec79",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "md5:bb300cfdad3c16e7a12a480ee83cd310",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}

_MOST_DOWNLOADED = 200_000_000  # bytes: the archive of CIFAR-10 has 170 million, the others less
_MOST_MEMBER = 40_000_000  # a batch has 31 million
_MOST_UNPACKED = 400_000_000  # the archive of CIFAR-10 unpacks to 186 million
_PART = 2**20


def cache_folder() -> Path:
    """Where downloads are kept: KDDP_CACHE, or the system's cache folder for this user."""
    return Path(os.environ.get("KDDP_CACHE") or pooch.os_cache("kddp_ext"))


def cifar10_folder() -> Path:
    """The folder that holds cifar-10-batches-py, downloaded (170 MB) and unpacked the first time."""
    cache = cache_folder()
    unpacked = cache / _CIFAR10_FOLDER
    if not all((unpacked / name).is_file() for name in _CIFAR10_FILES):
        archive = fetch(_CIFAR10_URL + _CIFAR10_ARCHIVE, _CIFAR10_HASH, _CIFAR10_ARCHIVE, cache)
        unpack(archive, [f"{_CIFAR10_FOLDER}/{name}" for name in _CIFAR10_FILES], cache)
    return cache


def fashion_mnist_folder() -> Path:
    """The folder that holds Fashion-MNIST's four files, downloaded (31 MB) the first time.

    Raises:
        WorkflowError: no connection, or other content. Such content is not kept.
    """
    folder = cache_folder() / "fashion-mnist"
    for name, (known_hash, known_content) in _FASHION_HASHES.items():
        path = fetch(_FASHION_URL + name, known_hash, name, folder)
        if _hash_of_content(path) != known_content:
            path.unlink()
            raise DataFileError(path, "the content of Fashion-MNIST", "other content with its MD5 sum")
    return folder


def _hash_of_content(path: Path) -> str:
    """SHA-256 of what a .gz file unpacks to; "" where it unpacks to too much or to nothing."""
    digest, left = hashlib.sha256(), _MOST_UNPACKED
    try:
        with gzip.open(path) as stream:
            while part := stream.read(_PART):
                digest.update(part)
                left -= len(part)
                if left < 0:
                    return ""
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return ""
    return digest.hexdigest()


def fetch(url: str, known_hash: str, name: str, folder: Path) -> Path:
    """Download `url` to `folder / name` unless a file with the hash is there; returns its path.

    Raises:
        WorkflowError: no connection, or content with another hash. Such content is not kept.
    """
    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(pooch.retrieve(url, known_hash, fname=name, path=folder, downloader=downloader))
    except (OSError, ValueError) as error:
        raise WorkflowError(
            f"cannot download {url} into {folder}: {error}. Download it by hand and give its folder with --data-dir."
        ) from error


def downloader(url: str, output_file: Any, caller: Any, **options: Any) -> None:
    """Fetch `url` into the file `output_file`, with a progress bar; pooch calls this."""
    with Progress() as display, open(output_file, "wb") as file:
        fetcher = pooch.HTTPDownloader(progressbar=_Bar(display, f"downloading {url}"))
        fetcher(url, _Limited(file), caller, **options)


class _Limited:
    """A file that takes no more than the longest download, for a server may send without end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = _MOST_DOWNLOADED

    def write(self, part: bytes) -> None:
        self._left -= len(part)
        if self._left < 0:
            raise OSError(f"the server sent more than {_MOST_DOWNLOADED} bytes")
        self._file.write(part)

    def flush(self) -> None:
        self._file.flush()


class _Bar:
    """Shows pooch's progress on rich's display; pooch sets `total` and calls the methods."""

    def __init__(self, display: Progress, label: str) -> None:
        self._display = display
        self._task = display.add_task(label, total=None)
        self.total: int | None = None

    def update(self, count: int) -> None:
        self._display.update(self._task, total=self.total, advance=count)

    def reset(self) -> None:
        self._display.reset(self._task)

    def close(self) -> None:
        self._display.refresh()


def unpack(archive: Path, members: list[str], folder: Path) -> None:
    """Copy the named `members` of a .tar.gz into `folder`, each whole or not at all.

    Only a header's plain fields are read, and only regular files are taken, so that no name, link, sparse file or
    extended header in it can lead outside, or make more of it than it has. It is unpacked no further than needed.

    Raises:
        DataFileError: a member is missing, too long or no regular file, or the archive is damaged.
    """
    try:
        with gzip.open(archive) as stream:
            wanted = set(members)
            while wanted:
                if stream.tell() > _MOST_UNPACKED:
                    raise DataFileError(archive, f"{sorted(wanted)[0]} within {_MOST_UNPACKED} bytes", "it goes on")
                info = _next_member(stream)
                if info is None:
                    raise DataFileError(archive, "an archive of CIFAR-10", f"none with {sorted(wanted)[0]}")
                if info.name not in wanted:
                    _copy(stream, None, min(_padded(info.size), _MOST_UNPACKED + 1))
                    continue
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise DataFileError(archive, f"a regular file {info.name}", "something else by that name")
                if info.size > _MOST_MEMBER:
                    raise DataFileError(archive, f"{info.name} of at most {_MOST_MEMBER} bytes", f"{info.size}")
                wanted.remove(info.name)
                target = folder / info.name
                target.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(target, partial(_copy, stream, count=info.size))
                _copy(stream, None, _padded(info.size) - info.size)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataFileError(archive, "a complete .tar.gz", f"damaged content ({error})") from error


def _next_member(stream: gzip.GzipFile) -> tarfile.TarInfo | None:
    """The header that the stream stands before; None at the archive's end."""
    header = stream.read(tarfile.BLOCKSIZE)
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    if info.size < 0:
        raise tarfile.ReadError("a member of negative size")
    return info


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _copy(stream: gzip.GzipFile, target: IO[bytes] | None, count: int) -> None:
    """Copy so many bytes to `target`, or pass over them."""
    while count:
        part = stream.read(min(count, _PART))
        if not part:
            raise EOFError("it ends within a member")
        if target is not None:
            target.write(part)
        count -= len(part)
