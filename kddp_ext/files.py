"""Files and their contents: atomic writes, JSON, and SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


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


def parse_json(text: str, *, most: int | None = None) -> Any:
    """The value of a JSON text that may come from anywhere.

    Args:
        text: JSON of one value.
        most: the largest number of characters that is accepted; None accepts any.

    Raises:
        ValueError: the text is not JSON, is too long or nested too deeply, or contains NaN or Infinity, which
            JSON does not have.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected JSON text, got {type(text).__name__}")
    if most is not None and len(text) > most:
        raise ValueError(f"expected at most {most} characters, got {len(text)}")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it contains {name}, which is not JSON")


def hash_json(value: dict[str, Any]) -> str:
    """SHA-256 of the JSON of `value` with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of `tensors`, sorted by name."""
    import torch  # the command line reads this file before it needs torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, made of what JSON knows, and under "sha256" the SHA-256 of it: of its JSON with sorted keys."""
    return {**value, "sha256": hash_json(value)}


def without_digest(value: dict[str, Any]) -> dict[str, Any]:
    """What `with_digest` was given; a value that has no digest is taken as it is.

    Raises:
        ValueError: the value has changed since.
    """
    rest = {key: each for key, each in value.items() if key != "sha256"}
    if "sha256" in value and value["sha256"] != hash_json(rest):
        raise ValueError("its content does not match its sha256")
    return rest


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
