"""Replacements for the calls that change files. One of them kills the process, or all fail from some call on.

They are installed in processes of the tests. The package does not know them.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

# Calls that change a folder or a file. Writes go through the file of `os.fdopen`.
_CALLS = ("open", "mkdir", "fsync", "chmod", "replace", "rename", "unlink", "rmdir")
_WITHOUT_SPACE = ("chmod", "unlink", "rmdir")  # these work on a full disk


def die_at(number: int) -> None:
    """Have this process killed at its call numbered `number`, counted from 1. Half of a write is done before."""

    def at(count: int, _name: str, _path: Any) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch_calls(at)


def fail_from(number: int, error: int = errno.ENOSPC) -> None:
    """Have this process find the disk full from its call numbered `number` on."""

    def at(count: int, name: str, path: Any) -> None:
        if count >= number and name not in _WITHOUT_SPACE:
            raise OSError(error, os.strerror(error), *([path] if isinstance(path, (str, os.PathLike)) else []))

    _watch_calls(at)


def _watch_calls(at: Callable[[int, str, Any], None]) -> None:
    """Call `at(count, name, path)` before each call that changes a file; what it raises comes out of the call."""
    count = 0

    def happens(name: str, path: Any) -> None:
        nonlocal count
        count += 1
        at(count, name, path)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if name != "open" or args[0] & (os.O_WRONLY | os.O_RDWR):
                happens(name, path)
            return function(path, *args, **options)

        return call

    for name in _CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    fdopen = os.fdopen
    os.fdopen = lambda descriptor, *args, **options: _Watched(fdopen(descriptor, *args, **options), happens)  # type: ignore[assignment]


class _Watched:
    """A file that calls `happens` in the middle of each write, when half of it is on the disk."""

    def __init__(self, file: Any, happens: Callable[[str, Any], None]) -> None:
        self._file, self._happens = file, happens

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._happens("write", self._file.fileno())
        self._file.write(content[half:])
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
