"""How a command ends, above all one that is stopped from outside: by a signal, or as nobody takes what it prints."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a request to end (SIGTERM).

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise `Interrupted` for as long as the context lasts; a second one ends the process.

    Of several processes each keeps what it has: one that waits for another in a library would not see the exception,
    and could not be ended. So does a thread, which cannot ask for signals, and one that was told to ignore them.
    """
    asks = threading.current_thread() is threading.main_thread() and not _among_several()
    numbers = (signal.SIGINT, signal.SIGTERM) if asks else ()

    def end(number: int, _frame: FrameType | None) -> None:
        for each in former:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    former = {each: signal.getsignal(each) for each in numbers}
    former = {each: handler for each, handler in former.items() if handler not in (signal.SIG_IGN, None)}
    for each in former:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)


class OutputError(OSError):
    """Stdout takes nothing any more."""


class Output(Console):
    """The console on stdout; where that fails, `print` raises OutputError."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, which would end the process when a pipe is broken."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error

    def on_broken_pipe(self) -> None:
        """Called while a BrokenPipeError is handled."""
        raise


def flush_stdout() -> None:
    """Write what is waiting, while a failure can still be told. Raises OutputError."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


def give_up_stdout() -> None:
    """Throw away what is waiting for stdout, or the interpreter would fail on it at its end."""
    with suppress(OSError, ValueError):  # it may have no number
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, sys.stdout.fileno())
        os.close(nobody)


def end_process(code: int) -> NoReturn:
    """End with this exit code, the interpreter's own tidying left out where torchrun started several processes.

    A thread of gloo may let go of a tensor only then, and torch aborts the process for it: torchrun would call a run
    failed that has finished.
    """
    if not _among_several():
        sys.exit(code)
    for file in (sys.stdout, sys.stderr):
        if file is not None:
            with suppress(OSError, ValueError):  # the exit code tells of it already
                file.flush()
    os._exit(code)


def fill_standard_files() -> None:
    """Give what stdin, stdout and stderr are where they were closed to nobody.

    The next file that is opened would get the number of one that is closed, and what a library prints would be
    written into it.
    """
    for number in range(3):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _among_several() -> bool:
    """Whether torchrun started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
