"""The failures that a user can mend: the command line prints them as one line and ends with code 2."""

from __future__ import annotations


class WorkflowError(ValueError):
    """A setting, file or folder that does not serve. The message says which, and what to do."""


class DataFileError(WorkflowError):
    """A data file that is missing, truncated or something else than expected."""

    def __init__(self, path: object, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}")
