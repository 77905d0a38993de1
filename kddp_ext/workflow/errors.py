"""The failures that a user can mend: the command line prints them as one line and ends with code 2."""

from __future__ import annotations


class WorkflowError(ValueError):
    """A setting, file or folder that does not serve. The message says which, and what to do."""


class SharedError(WorkflowError):
    """What all processes of a run raise alike when one of them fails."""


class LostProcessError(WorkflowError):
    """Another process of the run has ended, or cannot be reached."""


class DataFileError(WorkflowError):
    """A data file that is missing, truncated or something else than expected."""

    def __init__(self, path: object, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}")


def message_of(error: Exception) -> str:
    """The line to print: atomic_write's errors say all, the system's own need their file's name in front."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
