"""Files that are never half written: written beside their place, synced, then renamed over it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds either all of the new content or all of the old.

    Args:
        path: where the content goes; its folder must exist.
        write: receives an open binary file and writes the content to it.

    Raises:
        OSError: the file could not be written (no such folder, no permission, a full disk). The message
            names `path`; what stood there before still does, and nothing is left beside it.
    """
    path = Path(path)
    try:
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(beside, path)
        _sync_folder(path.parent)
    except BaseException as error:
        _remove_quietly(beside)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically. Raises as `atomic_write` does."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises as `atomic_write` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what `atomic_write` left beside its places in `folder` when its process was killed.

    The caller sees to it that nobody writes there now.
    """
    for beside in leftovers(folder):
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink()


def leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """What lies in `folder` and did not get into its place: files of `atomic_write`, folders named likewise."""
    return sorted(Path(folder).glob(".*.partial"))


def _sync_folder(folder: Path) -> None:
    """Have the renaming outlast a loss of power too."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # one may be allowed to write there and not to read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that cannot
            raise
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot write {path}: {error.strerror or error}")


def _remove_quietly(path: str) -> None:
    with suppress(OSError):  # the failure that brought us here is the one to report
        os.unlink(path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
