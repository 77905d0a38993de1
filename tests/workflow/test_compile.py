"""`--compile`: a compiled training ends close to an eager one, and resumes exactly."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from workflow_ranks import KilledError, dies_after

from kddp_ext.workflow import train
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import Job
from kddp_ext.workflow.models import build_teacher
from kddp_ext.workflow.runs import Run, train_student
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.teacher_logits import TeacherLogits

HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").is_file()
pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")


def train_kddp(path: Path, config: RunConfig) -> dict[str, Any]:
    """Train or continue the stage kddp with an untrained teacher; returns its last checkpoint."""
    runtime, info = Runtime("cpu", "float32"), INFO["digits"]
    data = ImageData(read_dataset("digits", None), info, config, runtime.device)
    run = Run(RunFolder(path), data, runtime, Console(quiet=True))
    teacher = TeacherLogits(build_teacher(config, info), data, config.student.shift, run.folder.teacher_logits, runtime)
    run.folder.job("kddp").mkdir(parents=True, exist_ok=True)
    train_student(run, Job("kddp", "kddp", config), teacher)
    end: dict[str, Any] = torch.load(run.folder.checkpoint("kddp"), weights_only=True)
    return end


def test_compiled_training_ends_close_to_eager_and_resumes_bit_for_bit(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = dataclasses.replace(small.student, channels=(4,), width=16, epochs=3)
    pruning = dataclasses.replace(small.pruning, l1_weight=0.005)
    eager = dataclasses.replace(small, student=student, pruning=pruning)
    compiled = dataclasses.replace(eager, compile=True)
    whole = train_kddp(tmp_path / "whole", compiled)
    # Killed after the first epoch, whose prune changed the network.
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", dies_after(train.train_epoch, 1))
        with pytest.raises(KilledError):
            train_kddp(tmp_path / "killed", compiled)
    resumed = train_kddp(tmp_path / "killed", compiled)
    assert len(whole["model"]["hidden.weight"]) < student.width
    assert whole["history"] == resumed["history"]
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name

    expected = train_kddp(tmp_path / "eager", eager)
    assert whole["history"] == expected["history"]
    for name, value in expected["model"].items():
        assert (whole["model"][name] - value).abs().max() <= 1e-3 * value.abs().max(), name
