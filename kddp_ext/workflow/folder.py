"""The folder of a run: what lies where, and who may continue it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kddp_ext.files import hash_json, leftovers, with_digest, without_digest, write_json, write_text
from kddp_ext.workflow.config import RunConfig, differences, load_config
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.job import STAGES
from kddp_ext.workflow.read_files import read_bytes

_MOST_BYTES = 2**26  # of a file of results


class RunFolder:
    """Paths of one run, runs/NAME.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.sweep = path / "sweep.json"
        self.report = path / "report.md"
        self.timing = path / "timing.json"
        self.timing_report = path / "timing.md"
        # Beside the runs: whatever runs lie there share them.
        self.teacher_logits = path.parent / "teacher_logits"

    def job(self, job: str) -> Path:
        """The folder of one training; in a run its name is that of its stage."""
        return self.path / job

    def checkpoint(self, job: str) -> Path:
        """Model, optimizer and pruner after the training's latest epoch."""
        return self.job(job) / "checkpoint.pt"

    def student(self, job: str) -> Path:
        """The finished student, a safetensors file."""
        return self.job(job) / "student.safetensors"

    def tensorboard(self, job: str) -> Path:
        """The folder of the training's event files, where they were asked for."""
        return self.job(job) / "tensorboard"

    def result(self, job: str) -> Path:
        """The figures of the finished training."""
        return self.job(job) / "result.json"

    def write_epochs(self, job: str, epochs: list[dict[str, Any]]) -> None:
        """Write the metrics of each epoch, a line of JSON each."""
        write_text(self.job(job) / "metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def read_epochs(self, job: str) -> list[dict[str, Any]]:
        """What `write_epochs` wrote.

        Raises:
            WorkflowError: the file is damaged, or not of the training that has finished here.
        """
        path = self.job(job) / "metrics.jsonl"
        advice = f"Delete {self.result(job)} and resume, and both are written anew from the checkpoint."
        epochs = [_parse(path, line, advice) for line in _read(path, advice).splitlines()]
        result = self._read_result(job) or {}
        digest = digest_of_epochs(epochs)
        if result.get("metrics_sha256", digest) != digest:
            raise WorkflowError(f"{path} is damaged: its content does not match {self.result(job)}. {advice}")
        return epochs

    def write_result(self, job: str, result: dict[str, Any], epochs: list[dict[str, Any]]) -> None:
        """Write a training's figures, and a digest of its metrics; this is what marks it as finished."""
        content = {"job": job, **result, "metrics_sha256": digest_of_epochs(epochs)}
        write_json(self.result(job), with_digest(content))

    def read_result(self, job: str) -> dict[str, Any] | None:
        """A finished training's figures, None for one that is not finished.

        Raises:
            WorkflowError: the file is damaged, or of another training.
        """
        content = self._read_result(job)
        return None if content is None else {key: each for key, each in content.items() if key != "metrics_sha256"}

    def _read_result(self, job: str) -> dict[str, Any] | None:
        path = self.result(job)
        advice = "Delete it and resume, and it is measured anew from the checkpoint."
        if not path.exists():
            return None
        if not path.is_file():
            raise WorkflowError(f"{path} is damaged: it is no file. {advice}")
        try:
            result = without_digest(_parse(path, _read(path, advice), advice))
        except WorkflowError:
            raise
        except ValueError as error:
            raise WorkflowError(f"{path} is damaged: {error}. {advice}") from error
        if result.get("job", job) != job:
            raise WorkflowError(f"{path} belongs to the training {result['job']}. {advice}")
        return result


def digest_of_epochs(epochs: list[dict[str, Any]]) -> str:
    """Of the metrics but for the seconds, which differ each time."""
    timeless = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]
    return hash_json({"epochs": timeless})


def make_folder(path: Path, what: str) -> None:
    """Make the folder of a run or a sweep, unless it is there.

    Raises:
        WorkflowError: something that is no folder is there.
        OSError: it can't be made.
    """
    if path.exists() and not path.is_dir():
        raise WorkflowError(f"{path} exists and is not a {what} of kddp. Give another --name or --runs-dir.")
    path.mkdir(parents=True, exist_ok=True)


def open_run(path: Path, config: RunConfig, *, resume: bool) -> RunFolder:
    """Start the run in the folder `path`, or continue it. No other process may be doing so.

    Raises:
        WorkflowError: a run is there and `resume` is not set, or it was started with another config (the
            message names the fields), or the folder is something else.
        OSError: the folder can't be written to.
    """
    folder = RunFolder(path)
    # A run that stopped before its first stage, for want of its data say, has nothing to lose.
    begun = folder.config.is_file() and any(folder.job(stage).exists() for stage in STAGES)
    if begun:
        if not resume:
            raise WorkflowError(f"{path} holds a run already. Continue it with --resume, or start another with --name.")
        changed = differences(load_config(folder.config), config)
        if changed:
            raise WorkflowError(
                f"{path} was started with other settings: {'; '.join(changed)}. "
                "Resume with the settings it was started with, or give another --name."
            )
        return folder
    if not folder.config.is_file() and not is_empty(path):
        raise WorkflowError(f"{path} exists and is not a run of kddp. Give another --name or --runs-dir.")
    write_json(folder.config, with_digest(config.to_json()))
    return folder


def is_empty(path: Path) -> bool:
    """Whether a folder holds nothing, or only what a process left there that was killed at its first write."""
    return set(path.iterdir()) <= set(leftovers(path))


class InUseError(WorkflowError):
    """Another process works in a folder."""


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of the folder `path` for as long as the context lasts, or this one.

    Args:
        wait: until another process has left it.

    Raises:
        InUseError: another process is in it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InUseError(f"{path} is in use by another kddp process") from error
        except OSError as error:
            raise OSError(error.errno, f"cannot lock {path}: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)


def require_run(path: Path) -> RunFolder:
    """The run in `path`; raises WorkflowError where there is none."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise WorkflowError(f"{path} is not a run of kddp: it has no config.json")
    return folder


def _read(path: Path, advice: str) -> str:
    if not path.exists():
        raise WorkflowError(f"{path} is missing. {advice}")
    try:
        return read_bytes(path, "UTF-8 text", _MOST_BYTES).decode("utf-8")
    except ValueError as error:
        raise WorkflowError(f"{path} is damaged: {error}. {advice}") from error


def _parse(path: Path, text: str, advice: str) -> dict[str, Any]:
    try:
        value = json.loads(text)  # a loss may be NaN
    except ValueError as error:
        raise WorkflowError(f"{path} is damaged: {error}. {advice}") from error
    if not isinstance(value, dict):
        raise WorkflowError(f"{path} is damaged: expected a JSON object, found {text[:40]!r}. {advice}")
    return value
