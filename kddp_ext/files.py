"""Files and their contents: atomic writes, JSON, and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` has either all of the new content or all of the old.

    The content is written to a temporary file beside `path`, synced, and renamed.

    Args:
        path: the file; its folder must exist.
        write: writes the content to the open binary file that it is given.

    Raises:
        OSError: the file cannot be written (no such folder, no permission, a full disk). The message names `path`. An
            old file is kept, and no temporary file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # report the first error
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically. Raises as `atomic_write` does."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises as `atomic_write` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def parse_json(text: str, *, most: int | None = None) -> Any:
    """Parse JSON from an untrusted source, of at most `most` characters.

    Raises:
        ValueError: the text is too long, nested too deeply, or not JSON; NaN and Infinity are not JSON.
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
    import torch  # `kddp --help` imports this module and must not import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the `leftovers` in `folder`. The caller must make sure that no other process writes there."""
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Temporary files and folders, named .*.partial, that a killed process left in `folder`."""
    return sorted(Path(folder).glob(".*.partial"))


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that the renaming survives a loss of power. Some folders and file systems do not allow it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
