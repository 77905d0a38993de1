"""Functions that the ranks of workflow/test_distributed.py run, each in its own process."""

import dataclasses
import io
from contextlib import ExitStack
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from kddp_ext.workflow import runs, teacher_logits, train
from kddp_ext.workflow.config import SweepConfig
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.runtime import Runtime


class GroupNorm(nn.GroupNorm):
    """Stands in for BatchNorm2d where one and two processes are compared: it does not depend on the batch."""

    def __init__(self, channels, momentum=0.1):
        super().__init__(1, channels)


def run_share(rank, path, config, *, resume=False, fails=None, steps=None, norm=GroupNorm):
    """This rank's part of a run of `config` in `path`, in float64.

    In float32, Adam would amplify the rounding of another order of summation beyond any useful bound.

    Args:
        fails: (rank, name): on this rank, a function fails, see `failing`.
        steps: the run is killed after this number of steps.
        norm: replaces nn.BatchNorm2d.

    Returns:
        The message of a WorkflowError, the output, and the weights of each stage.
    """
    console, weights, message = Console(file=io.StringIO(), width=120), {}, None
    measure = runs._measure

    def keep_weights(run, job, model, *others):
        weights[job.name] = {name: value.clone() for name, value in model.state_dict().items()}
        return measure(run, job, model, *others)

    with ExitStack() as patches:
        patches.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        patches.enter_context(mock.patch.object(nn, "BatchNorm2d", norm))
        patches.enter_context(mock.patch.object(runs, "_measure", keep_weights))
        # Drawing would take longer than the training.
        patches.enter_context(mock.patch.object(runs, "write_report", lambda folder, *_: folder.report.write_text("")))
        if fails is not None and fails[0] == rank:
            patches.enter_context(failing(fails[1]))
        if steps is not None:
            patches.enter_context(mock.patch.object(train, "_train_step", dies_after(train._train_step, steps)))
        try:
            runs.run_sweep(path, SweepConfig.single(config), console, device="cpu", resume=resume)
        except KilledError:
            message = "killed"
        except WorkflowError as error:
            message = str(error)
        except RuntimeError as error:
            if "gloo/" not in str(error):
                raise
            message = "lost the other"
    return message, console.file.getvalue(), weights


def failing(name):
    """A patch with which a function fails."""

    def fail(*_args, **_options):
        raise WorkflowError(name)

    return mock.patch.object(runs, {"the data set": "read_dataset", "a checkpoint": "save_checkpoint"}[name], fail)


class KilledError(Exception):
    """Stands in for a killed process."""


def dies_after(function, calls):
    left = calls

    def call(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return function(*args)

    return call


class CountingTeacher(nn.Module):
    """A linear teacher that counts its images."""

    def __init__(self, seed=0):
        super().__init__()
        self.register_buffer("weight", torch.randn(10, 768, generator=torch.Generator().manual_seed(seed)))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.flatten(1) @ self.weight.T


def ask_teacher(rank, folder, data, batch=20):
    """Logits of the views 0, 1 and 0, each by a new teacher, and the number of images that each teacher saw."""
    answers = []
    with mock.patch.object(teacher_logits, "_BATCH", batch):
        for view in (0, 1, 0):
            teacher = CountingTeacher()
            runtime = Runtime("cpu", "float32")
            logits = teacher_logits.TeacherLogits(teacher, data, 2, folder, runtime).view(view)
            answers.append((logits.clone(), teacher.seen))
    return answers


def run_share_with_own_seed(rank, path, config):
    return run_share(rank, path, dataclasses.replace(config, seed=rank))
