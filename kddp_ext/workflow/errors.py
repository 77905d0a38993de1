"""Errors that the user can fix. The command line prints them as one line and exits with code 2."""

from __future__ import annotations


class WorkflowError(ValueError):
    """A setting, file or folder cannot be used. The message says which, and what to do."""


class OptionError(WorkflowError):
    """An option has a value that cannot be used. `option` may be the name of the setting's field."""

    def __init__(self, option: str, expected: str, got: object) -> None:
        super().__init__(f"--{option.replace('_', '-')}: expected {expected}, got {got}")


class DataFileError(WorkflowError):
    """A data file is missing, truncated, or has other content than expected."""

    def __init__(self, path: object, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}")
