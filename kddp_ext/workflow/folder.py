"""The folder of a run or a sweep: which file lies where, who may write there, and how checkpoints are read."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kddp_ext.files import atomic_write, leftovers, parse_json, remove_leftovers, write_json, write_text
from kddp_ext.workflow.config import SweepConfig, differences
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.jobs import TEACHER, Point, Stage, points

CHECKPOINT_VERSION = 2
_CHECKPOINT_FIELDS = {"version", "stage", "model", "optimizers", "pruner", "history", "epochs"}
FIGURES = ("test_accuracy", "parameters", "linear_parameters", "macs")  # of every result
_NO_RUN = "exists and is not a run of kddp. Give another --name or --runs-dir."
# The settings, besides all of `teacher`, that decide a teacher's weights.
_TEACHER_SETTINGS = (
    "dataset",
    "size",
    "channels",
    "flip",
    "data_seed",
    "validation",
    "augment",
    "precision",
    "compile",
)


class RunFolder:
    """The files of a run or a sweep in the folder `path`, runs/NAME."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.data = path / "data.json"
        self.report = path / "report.md"
        self.picture = path / "report.png"
        self.page = path / "report.html"
        self.timing = path / "timing.md"
        # All runs beside this one share the teachers' logits and decoded images.
        self.teacher_logits = path.parent / "teacher_logits"
        self.images = path.parent / "images"

    def job(self, job: str) -> Path:
        """The folder of one training."""
        return self.path / job

    def checkpoint(self, job: str) -> Path:
        """Model, optimizers and pruner after the training's latest epoch."""
        return self.job(job) / "checkpoint.pt"

    def student(self, job: str) -> Path:
        """The finished student, a safetensors file."""
        return self.job(job) / "student.safetensors"

    def best(self, job: str) -> Path:
        """The student at the epoch with the best validation accuracy, a safetensors file."""
        return self.job(job) / "best.safetensors"

    def tensorboard(self, job: str) -> Path:
        """The folder of the training's event files."""
        return self.job(job) / "tensorboard"

    def metrics(self, job: str) -> Path:
        """The metrics of each epoch, one line of JSON each."""
        return self.job(job) / "metrics.jsonl"

    def result(self, job: str) -> Path:
        """The figures of a finished training. Its presence marks the training as finished."""
        return self.job(job) / "result.json"

    def write_epochs(self, job: str, epochs: list[dict[str, Any]]) -> None:
        """Write the metrics of each epoch."""
        write_text(self.metrics(job), "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def read_epochs(self, job: str) -> list[dict[str, Any]]:
        """Read what `write_epochs` wrote; raises WorkflowError if the file is missing or damaged."""
        path = self.metrics(job)
        advice = f"Delete {self.result(job)} and resume to write both again from the checkpoint."
        return [_parse_object(path, line, advice) for line in _read(path, advice).splitlines()]

    def read_result(self, job: str) -> dict[str, Any] | None:
        """A finished training's figures, None for an unfinished one; raises WorkflowError if the file is damaged."""
        path = self.result(job)
        if not path.exists():
            return None
        advice = "Delete it and resume to measure again from the checkpoint."
        result = _parse_object(path, _read(path, advice), advice)
        if not all(isinstance(result.get(key), int | float) for key in FIGURES) or "width" not in result:
            raise WorkflowError(f"{path} is not the result of a training. {advice}")
        return result

    def read_config(self) -> SweepConfig:
        """The settings in config.json; raises WorkflowError naming the file if it cannot be used."""
        if not self.config.is_file():
            raise WorkflowError(f"{self.path} is not a run of kddp: it has no config.json")
        try:
            return SweepConfig.from_json(parse_json(self.config.read_text(encoding="utf-8")))
        except ValueError as error:
            raise WorkflowError(f"{self.config} does not hold the settings of a run: {error}") from error

    def read_info(self) -> DatasetInfo:
        """What data.json says of the data set; raises WorkflowError naming the file if it cannot be used."""
        try:
            return DatasetInfo.from_json(parse_json(self.data.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise WorkflowError(f"{self.data} does not describe the run's data set: {error}") from error

    def points(self, sweep: SweepConfig) -> list[Point]:
        """The points of a sweep, as far as its finished trainings determine them."""
        found = {}
        for job in (job for point in points(sweep, {}) if point.kind == "kddp" for job in point.jobs):
            result = self.read_result(job.name) if sweep.retrain else None
            if result is not None and result["width"] is not None:
                found[job.name] = result["width"]
        return points(sweep, found)


def open_folder(
    path: Path, sweep: SweepConfig, info: DatasetInfo, *, resume: bool, teacher_from: Path | None = None
) -> RunFolder:
    """Start a run or sweep in `path`, or continue the one that is there, with the teacher of the run in `teacher_from`.

    Raises:
        WorkflowError: a run is there and `resume` is False; or it was started with other settings, which the message
            names, or with other images; or `path` is something else; or the teacher does not fit.
        OSError: the folder cannot be written to.
    """
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise WorkflowError(f"{path} {_NO_RUN}")
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        # A run that stopped before its first training, for example for lack of data, has nothing to lose.
        if folder.config.is_file() and any(each.is_dir() and each.name[0] != "." for each in path.iterdir()):
            if not resume:
                raise WorkflowError(f"{path} holds a run already. Continue it with --resume, or give another --name.")
            changed = differences(folder.read_config().run.options(), sweep.run.options())
            if changed:
                raise WorkflowError(
                    f"{path} was started with other settings: {'; '.join(changed)}. "
                    "Resume with the settings it was started with, or give another --name."
                )
            if folder.read_info() != info:
                raise WorkflowError(f"{path} was started with other images. Restore them, or give another --name.")
        elif not folder.config.is_file() and not {*path.iterdir()} <= {*leftovers(path)}:
            raise WorkflowError(f"{path} {_NO_RUN}")
        remove_leftovers(path)
        write_json(folder.config, sweep.to_json())
        write_json(folder.data, dataclasses.asdict(info))
        if teacher_from is not None:
            take_teacher(folder, teacher_from, sweep)
    return folder


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of the folder `path`. Yields whether it is held: False if another process has it and not `wait`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError as error:
            raise OSError(error.errno, f"cannot lock {path}: {error.strerror}") from error
        yield held
    finally:
        os.close(descriptor)


def take_teacher(folder: RunFolder, source: Path, sweep: SweepConfig) -> None:
    """Copy the finished teacher of the run in `source`, trained with `sweep`'s settings, unless `folder` has one."""
    if folder.read_result(TEACHER) is not None:
        return
    other = RunFolder(source)
    if other.read_result(TEACHER) is None:
        raise WorkflowError(f"--teacher-from: expected a run with a finished teacher, got {source}")
    changed = differences(other.read_config().run.options(), sweep.run.options())
    changed = [each for each in changed if each.startswith(("teacher.", *_TEACHER_SETTINGS))]
    if not changed and other.read_info() != folder.read_info():
        changed = ["other images"]
    if changed:
        raise WorkflowError(
            f"--teacher-from: the teacher of {source} was trained with other settings: {'; '.join(changed)}"
        )
    folder.job(TEACHER).mkdir(exist_ok=True)
    for file in (RunFolder.checkpoint, RunFolder.metrics, RunFolder.result):  # the last one marks it as finished
        content = file(other, TEACHER).read_bytes()
        atomic_write(file(folder, TEACHER), lambda copy, content=content: copy.write(content))  # type: ignore[misc]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, which holds tensors and plain values. If that fails with an OSError, the old file is kept."""
    # Serialised in memory first, so that torch.save never sees (and rewords) an error of the disk.
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **state}, buffer)
    atomic_write(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path, stage: Stage) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote for `stage`, with weights_only=True; raises WorkflowError if it is another."""
    advice = f"Delete it to train the stage {stage} again; other stages are not affected."
    if not path.is_file():
        raise WorkflowError(f"{path} is not a file. {advice}")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load does not verify the archive's checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise any kind of exception
        reason = str(error).strip().split("\n", 1)[0]
        raise WorkflowError(f"{path} is damaged or not a checkpoint ({reason}). {advice}") from error
    if not isinstance(state, dict) or not state.keys() >= _CHECKPOINT_FIELDS:
        raise WorkflowError(f"{path} is not a checkpoint of kddp. {advice}")
    if state["version"] != CHECKPOINT_VERSION:
        raise WorkflowError(f"{path} has version {state['version']}; expected {CHECKPOINT_VERSION}. {advice}")
    if state["stage"] != stage:
        raise WorkflowError(f"{path} belongs to the stage {state['stage']}. {advice}")
    return state


def _read(path: Path, advice: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise WorkflowError(f"{path} cannot be read: {error}. {advice}") from error


def _parse_object(path: Path, text: str, advice: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise WorkflowError(f"{path} is damaged: {error}. {advice}") from error
    if not isinstance(value, dict):
        raise WorkflowError(f"{path} is damaged: expected a JSON object, got {text[:40]!r}. {advice}")
    return value
