"""What the ranks of workflow/test_processes.py run, each in a process of its own."""

import copy
import dataclasses
import io
from contextlib import ExitStack
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kddp_ext
from kddp_ext.workflow import runs, teacher_logits, train
from kddp_ext.workflow.batch_norm import join_batches
from kddp_ext.workflow.config import SweepConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.errors import SharedError, WorkflowError
from kddp_ext.workflow.processes import Processes
from kddp_ext.workflow.runtime import Runtime


def run_share(rank, path, config, count=2, *, resume=False, fails=None, steps=None):
    """A run of `config` in `path` by `count` processes, in float64.

    Adam divides by what it has seen of a gradient: where that is rounding alone, another order of summation turns
    the step around. In float32 such steps differ by more than an error would, on some processors.

    Args:
        fails: (rank, name) of a process and a function of `failures` that it cannot call.
        steps: the run is killed after so many steps.

    Returns:
        The message of a WorkflowError, what the console got, and the weights of each stage.
    """
    console, weights, message = Console(file=io.StringIO(), width=120), {}, None
    measure = runs._measure

    def keep_weights(run, job, training):
        weights[job.name] = {name: value.clone() for name, value in training.model.state_dict().items()}
        return measure(run, job, training)

    with ExitStack() as patches:
        patches.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        patches.enter_context(mock.patch.object(runs, "_measure", keep_weights))
        # Drawing takes longer than such a training.
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
    """What fails, by its name, without a word to the other ranks."""

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
    """Stands in for processes that end."""


def dies_after(function, calls):
    left = calls

    def call(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return function(*args)

    return call


def batch_norm(rank, module, steps, count, autocast=False):
    """`steps` batches through `module`, of which each rank sees every second row; then one to evaluate.

    Returns:
        Outputs, gradients with respect to the inputs and of the parameters' shares, the module's state.
    """
    module = copy.deepcopy(module)  # what is sent to the ranks lies in memory that they share
    if count > 1:
        join_batches(nn.Sequential(module), Processes(rank, count))
    results = []
    for inputs, upstream in steps:
        mine = inputs[rank::count].clone().requires_grad_()
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(mine)
        output.backward(upstream[rank::count].to(output.dtype))
        gradients = [each.grad.clone() for each in module.parameters()]
        results.append((output.detach(), mine.grad, gradients))
    module.eval()
    return results, module(steps[0][0]).detach(), module.state_dict()


class CountingTeacher(nn.Module):
    """A linear teacher that counts the images it has seen."""

    def __init__(self, seed=0):
        super().__init__()
        self.register_buffer("weight", torch.randn(10, 768, generator=torch.Generator().manual_seed(seed)))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.flatten(1) @ self.weight.T


def ask_teacher(rank, folder, data, count=2, batch=20):
    """The logits of two views, the first of them twice, by teachers that are new each time; and what they saw."""
    answers = []
    with mock.patch.object(teacher_logits, "_BATCH", batch):
        for view in (0, 1, 0):
            teacher = CountingTeacher()
            runtime = Runtime("cpu", "float32", Processes(rank, count))
            progress = Progress(disable=True)
            logits = teacher_logits.TeacherLogits(teacher, data, 2, folder, runtime, progress).view(view)
            answers.append((logits.clone(), teacher.seen))
    return answers


def run_share_killed(rank, path, config, steps):
    return run_share(rank, path, config, steps=steps)


def run_share_resumed(rank, path, config):
    return run_share(rank, path, config, resume=True)


def run_share_failing(rank, path, config, failing, what, resume=False):
    return run_share(rank, path, config, fails=(failing, what), resume=resume)


def run_share_with_own_seed(rank, path, config):
    return run_share(rank, path, dataclasses.replace(config, seed=rank))


def narrowed_batch_norm(rank):
    """Whether a BatchNorm that a prune has narrowed normalises as one that was made narrow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    nn.init.zeros_(model[1].weight[:4])
    nn.init.constant_(model[1].bias[:4], -1)  # four neurons that never speak
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = kddp_ext.DynamicPruner(model, optimizer, example_inputs=(torch.randn(4, 6),), criterion="dead", patience=1)
    join_batches(model, Processes(rank, 2))
    wrapped = DistributedDataParallel(model, forward_sync_buffers=False)
    for seed in range(2):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))[rank::2]
        loss = kddp_ext.fused_kd_l1_loss(wrapped(inputs), None, torch.arange(8) % 3, pruner.activations, alpha=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if seed == 0:
            assert pruner.prune().neurons_pruned == 4
    narrow = nn.BatchNorm1d(5)
    narrow.load_state_dict(model[1].state_dict())
    inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(3))
    return torch.allclose(model[1](inputs[rank::2]), narrow(inputs)[rank::2], atol=1e-6)
