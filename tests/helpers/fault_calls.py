"""Stand-ins for the calls by which a run changes files, which do something else at one of them.

They are put into a process of the tests. The package knows nothing of them.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

# What changes a folder or a file, but for writing into it, which goes through `os.fdopen`'s file.
_CALLS = ("open", "mkdir", "fsync", "chmod", "replace", "rename", "unlink", "rmdir")


class FileCalls:
    """Counts the calls of this process that change files, and calls `at` before each of them.

    Args:
        at: gets the number of the call, counted from 1, its name, and the path (or the number of the file). What it
            raises comes out of the call. Of a write, half is done before.
    """

    def __init__(self, at: Callable[[int, str, Any], None]) -> None:
        self.count = 0
        self._at = at
        for name in _CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        fdopen = os.fdopen
        os.fdopen = lambda descriptor, *args, **options: _Watched(fdopen(descriptor, *args, **options), self)  # type: ignore[assignment]

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            reads = name == "open" and not args[0] & (os.O_WRONLY | os.O_RDWR)
            if not reads:
                self.happens(name, path)
            return function(path, *args, **options)

        return call

    def happens(self, name: str, path: Any) -> None:
        """One of the calls is about to be made."""
        self.count += 1
        self._at(self.count, name, path)


class _Watched:
    """A file whose writes are counted; half of each is on the disk when it is."""

    def __init__(self, file: Any, calls: FileCalls) -> None:
        self._file, self._calls = file, calls

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._calls.happens("write", self._file.fileno())
        self._file.write(content[half:])
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def die_at(number: int) -> None:
    """Have this process killed at the call numbered `number`."""

    def at(count: int, _name: str, _path: Any) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    FileCalls(at)


# What still works on a full disk.
_WITHOUT_SPACE = ("chmod", "unlink", "rmdir")


def fail_from(number: int, error: int = errno.ENOSPC) -> None:
    """Have this process find the disk full from the call numbered `number` on: nothing is made, written or synced."""

    def at(count: int, name: str, path: Any) -> None:
        if count >= number and name not in _WITHOUT_SPACE:
            raise OSError(error, os.strerror(error), *([path] if isinstance(path, (str, os.PathLike)) else []))

    FileCalls(at)
