"""Reading files that somebody else may have written: regular ones, and no more of them than there should be."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from kddp_ext.files import parse_json
from kddp_ext.workflow.errors import DataFileError


def read_bytes(path: Path, expected: str, most: int) -> bytes:
    """The content of `path`, which must be a regular file and no longer than `most` bytes.

    Raises:
        DataFileError: it is missing, cannot be read, is longer or something else.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for, a device never ends
            raise DataFileError(path, expected, "no regular file")
        if state.st_size > most:
            raise DataFileError(path, f"{expected} of at most {most} bytes", f"{state.st_size} bytes")
        with path.open("rb") as file:
            return file.read(state.st_size)
    except FileNotFoundError as error:
        raise DataFileError(path, expected, "no such file") from error
    except OSError as error:
        raise DataFileError(path, expected, f"one that cannot be read ({error.strerror})") from error


def read_json(path: Path, expected: str, most: int = 2**22) -> Any:
    """The value in a JSON file, read strictly (strict_json.py).

    Raises:
        DataFileError: as of `read_bytes`, or the file holds something else.
    """
    content = read_bytes(path, expected, most)
    try:
        return parse_json(content.decode("utf-8"), most=most)
    except ValueError as error:
        raise DataFileError(path, expected, f"something else: {error}") from error
