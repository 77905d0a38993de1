"""A teacher that another run has trained already."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from kddp_ext.workflow.config import RunConfig, differences, load_config
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.sweep_config import TEACHER, load_sweep

# What decides a teacher's weights, besides all of `teacher`.
_OF_THE_TEACHER = ("dataset", "data_seed", "validation", "augment", "precision", "compile")


def take_teacher(folder: RunFolder, source: Path, config: RunConfig) -> None:
    """Copy the finished teacher of the run or sweep in `source` into `folder`, unless a teacher is there already.

    Raises:
        WorkflowError: there is no finished teacher in `source`, or it was trained with settings other than `config`'s.
    """
    if folder.job(TEACHER).exists():
        return
    other = RunFolder(source)
    if other.read_result(TEACHER) is None:
        raise WorkflowError(f"--teacher-from: expected a run or sweep with a finished teacher, got {source}")
    saved = load_sweep(other.sweep).run if other.sweep.is_file() else load_config(other.config)
    changed = [each for each in differences(saved, config) if each.startswith(("teacher.", *_OF_THE_TEACHER))]
    if changed:
        raise WorkflowError(f"--teacher-from: the teacher of {source} was trained otherwise: {'; '.join(changed)}")
    # Renamed into place once it is whole; what an error leaves is removed, and what a kill leaves by the next process.
    try:
        with tempfile.TemporaryDirectory(prefix=".teacher.", suffix=".partial", dir=folder.path) as beside:
            os.replace(shutil.copytree(other.job(TEACHER), Path(beside) / TEACHER), folder.job(TEACHER))
    except OSError as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise OSError(error.errno, f"cannot copy {other.job(TEACHER)} to {folder.path}: {reason}") from error
