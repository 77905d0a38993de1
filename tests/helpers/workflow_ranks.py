"""Functions that the ranks of workflow/test_distributed.py run, each in its own process."""

import dataclasses
import io
from contextlib import ExitStack
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from kddp_ext.workflow import runs, teacher_logits, train
from kddp_ext.workflow.config import SweepConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.distributed import Processes
from kddp_ext.workflow.errors import SharedError, WorkflowError
from kddp_ext.workflow.runtime import Runtime


class GroupNorm(nn.GroupNorm):
    """Stands in for BatchNorm2d where one and two processes are compared: it does not depend on the batch."""

    def __init__(self, channels, momentum=0.1):
        super().__init__(1, channels)


def run_share(rank, path, config, count=2, *, resume=False, fails=None, steps=None, norm=GroupNorm):
    """This rank's part of a run of `config` in `path` by `count` processes, in float64.

    In float32, Adam would amplify the rounding of another order of summation beyond any useful bound.

    Args:
        fails: (rank, name): on this rank, the function `name` of `failures` fails.
        steps: the run is killed after this number of steps.
        norm: replaces nn.BatchNorm2d.

    Returns:
        The message of a SharedError, the output, and the weights of each stage.
    """
    console, weights, message = Console(file=io.StringIO(), width=120), {}, None
    measure = runs._measure

    def keep_weights(run, job, training):
        weights[job.name] = {name: value.clone() for name, value in training.model.state_dict().items()}
        return measure(run, job, training)

    with ExitStack() as patches:
        patches.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        patches.enter_context(mock.patch.object(nn, "BatchNorm2d", norm))
        patches.enter_context(mock.patch.object(runs, "_measure", keep_weights))
        # Drawing would take longer than the training.
        patches.enter_context(mock.patch.object(runs, "write_report", lambda folder, *_: folder.report.write_text("")))
        if fails is not None and fails[0] == rank:
            patches.enter_context(failures(rank)[fails[1]])
        if steps is not None:
            patches.enter_context(mock.patch.object(train, "_train_step", dies_after(train._train_step, steps)))
        try:
            sweep, processes = SweepConfig.single(config), Processes(rank, count)
            runs.run_sweep(path, sweep, console, device="cpu", resume=resume, processes=processes)
        except KilledError:
            message = "killed"
        except SharedError as error:
            message = str(error)
    return message, console.file.getvalue(), weights


def failures(rank):
    """Patches by name; each makes one function fail on this rank only."""

    def raise_workflow_error(*_args, **_options):
        raise WorkflowError(f"this is a fault of {rank}")

    def raise_os_error(*_args, **_options):
        raise FileNotFoundError(2, "No such file or directory", "the/file")

    return {
        "the data set": mock.patch.object(runs, "read_dataset", raise_workflow_error),
        "a checkpoint": mock.patch.object(runs, "load_checkpoint", raise_workflow_error),
        "a full disk": mock.patch.object(runs, "save_checkpoint", raise_os_error),
        "the images": mock.patch.object(ImageData, "__init__", raise_workflow_error),
    }


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


def ask_teacher(rank, folder, data, count=2, batch=20):
    """Logits of the views 0, 1 and 0, each by a new teacher, and the number of images that each teacher saw."""
    answers = []
    with mock.patch.object(teacher_logits, "_BATCH", batch):
        for view in (0, 1, 0):
            teacher = CountingTeacher()
            runtime = Runtime("cpu", "float32", Processes(rank, count))
            progress = Progress(disable=True)
            logits = teacher_logits.TeacherLogits(teacher, data, 2, folder, runtime, progress).view(view)
            answers.append((logits.clone(), teacher.seen))
    return answers


def run_share_with_own_seed(rank, path, config):
    return run_share(rank, path, dataclasses.replace(config, seed=rank))


def averaged_buffers(rank):
    """The buffers of a BatchNorm whose running mean is the rank, after they are averaged."""
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(rank)
    Processes(rank, 2).average_buffers(norm)
    return dict(norm.named_buffers())
