"""Trained networks on disk: finding them in a run's folder or a student's file, and loading them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

import kddp_ext
from kddp_ext.files import parse_json
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder, load_checkpoint
from kddp_ext.workflow.jobs import TEACHER
from kddp_ext.workflow.models import build_student, build_teacher


@dataclass(frozen=True)
class SavedModel:
    """A trained network on disk: its training's name, its file, its stage and settings.

    `history` is what was pruned; None for the teacher.
    """

    name: str
    path: Path
    stage: str
    config: RunConfig
    info: DatasetInfo
    history: kddp_ext.PruningHistory | None

    def load(self, own: Mapping[str, str] = MappingProxyType({})) -> nn.Module:
        """The network on the CPU with its weights.

        `own` has the user's MODULE:FUNCTION for "teacher" and "student". It is needed for a network that was trained
        from one, because a file must not decide which code runs.
        """
        kind = "teacher" if self.history is None else "student"
        settings = getattr(self.config, kind)
        given = ":".join(own.get(kind, "").split(":")[:2])  # without weights: the file has them
        if bool(settings.network) != bool(given):
            expected = (
                f"give --{kind} {settings.network} if you trust it" if settings.network else "leave out --" + kind
            )
            trained_from = settings.network or f"--{kind}.architecture {settings.architecture}"
            raise WorkflowError(f"{self.path}: it was trained from {trained_from}; {expected}")
        config = dataclasses.replace(self.config, **{kind: dataclasses.replace(settings, network=given)})
        with _named(self.path):
            if self.history is not None:
                example = torch.zeros(2, self.info.channels, self.info.size, self.info.size)
                return kddp_ext.load_student(self.path, lambda: build_student(config, self.info), (example,))
            model = build_teacher(config, self.info)
            model.load_state_dict(load_checkpoint(self.path, "teacher")["model"])
            return model


def find_models(path: Path) -> list[SavedModel]:
    """The finished networks in `path`, a run's folder or a student file; raises WorkflowError if it is neither."""
    if not path.exists():
        raise WorkflowError(f"{path}: no such file or folder")
    if path.is_file():
        return [read_student(path)]
    folder = RunFolder(path)
    sweep = folder.read_config()
    jobs = {job.name: job for point in folder.points(sweep) for job in point.jobs}
    finished = [name for name in jobs if folder.read_result(name) is not None]
    if not finished:
        raise WorkflowError(f"{path}: no training of this run is finished yet. Continue it with --resume.")
    teacher = SavedModel(TEACHER, folder.checkpoint(TEACHER), "teacher", sweep.run, folder.read_info(), None)
    return [teacher if name == TEACHER else read_student(folder.student(name)) for name in finished]


def find_model(path: Path) -> SavedModel:
    """The finished network in `path`, the folder of one training or a student file; raises WorkflowError."""
    if path.is_dir() and not (path / "config.json").is_file() and (path.parent / "config.json").is_file():
        found = [each for each in find_models(path.parent) if each.path.parent == path]
        if not found:
            raise WorkflowError(f"{path}: this training is not finished yet. Continue its run with --resume.")
        return found[0]
    if path.is_dir():
        raise WorkflowError(f"{path}: expected the folder of one training, such as {path / TEACHER}, or a student file")
    return find_models(path)[0]


def read_student(path: Path) -> SavedModel:
    """The student in a file; raises WorkflowError if `path` is anything else."""
    if not path.is_file():
        raise WorkflowError(f"{path}: expected a student's file, such as runs/NAME/kddp/student.safetensors")
    with _named(path):
        header = kddp_ext.read_student_header(path)
        metadata = header["metadata"]
        if not {"config", "data", "stage"} <= metadata.keys():
            raise WorkflowError(f"{path} was not written by kddp run: its header has no config, data and stage")
        config = RunConfig.from_json(parse_json(metadata["config"], most=2**22))
        info = DatasetInfo.from_json(parse_json(metadata["data"], most=2**22))
        history = kddp_ext.PruningHistory.from_json(header["history"])
        return SavedModel(path.parent.name, path, metadata["stage"], config, info, history)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make an error about the content of a file a WorkflowError of one line that names the file."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise WorkflowError(message if str(path) in message else f"{path}: {message}") from error
