"""Finding the files of a data set and checking its labels, with errors that say what was looked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kddp_ext.workflow.errors import DataFileError


def find_folder(data_dir: Path, subfolders: Sequence[str], marks: Iterable[str]) -> Path:
    """The first of `data_dir` and its `subfolders` that holds a file named in `marks`."""
    marks = list(marks)
    folders = [data_dir, *(data_dir / name for name in subfolders)]
    for folder in folders:
        if any((folder / mark).is_file() for mark in marks):
            return folder
    found = "no such folder" if not data_dir.is_dir() else "neither there nor in " + ", ".join(subfolders)
    raise DataFileError(data_dir, f"a file {' or '.join(marks)}", found)


def check_labels(path: Path, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """`labels`, all of which must lie in 0 to classes - 1."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise DataFileError(path, f"labels from 0 to {classes - 1}", f"{wrong.size} others, the first {wrong[0]}")
    return labels
