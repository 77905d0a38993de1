"""Runs and sweeps: every training of the job list, then the report. A run is a sweep of one seed.

Any number of processes may work on one folder: each takes trainings that no other works on. The processes that torchrun
starts share each training instead.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kddp_ext
from kddp_ext.files import remove_leftovers, write_json
from kddp_ext.workflow import distributed
from kddp_ext.workflow.config import Device, PruningConfig, SweepConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, DatasetInfo, RawDataset, read_dataset
from kddp_ext.workflow.distributed import on_rank_zero
from kddp_ext.workflow.errors import OptionError, WorkflowError
from kddp_ext.workflow.folder import RunFolder, load_checkpoint, locked, open_folder, save_checkpoint
from kddp_ext.workflow.image_folder import read_image_folder
from kddp_ext.workflow.jobs import TEACHER, Job, points
from kddp_ext.workflow.measure import (
    accuracy,
    confusion,
    count_active,
    count_macs,
    count_parameters,
    nonzero_counts,
    share_correct,
)
from kddp_ext.workflow.models import FastTeacher, build_student, build_teacher, check_networks, check_own_networks
from kddp_ext.workflow.report import say, title_of, write_report
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.saved_models import read_student
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.tensorboard import require_tensorboard, write_events
from kddp_ext.workflow.train import Recipe, Training, best_epoch, compiled, student_recipe, teacher_recipe, train

_WAIT = 2.0  # seconds between two looks for work while other processes train what is left
_LINE_SECONDS = 10.0  # between two lines of a training where there is no terminal
_WHITENING_IMAGES = 2000  # enough patches for their principal components


@dataclass(frozen=True)
class Run:
    """What all trainings of a run share. `tensorboard` says whether event files are written."""

    folder: RunFolder
    data: ImageData
    runtime: Runtime
    console: Console
    tensorboard: bool = False


def run_sweep(
    path: Path,
    sweep: SweepConfig,
    console: Console,
    *,
    resume: bool = False,
    device: Device = "auto",
    teacher_from: Path | None = None,
    tensorboard: bool = False,
) -> None:
    """Train everything in `path` that is not finished, then write and print the report.

    The options are those of `kddp run`. The first of several processes writes the files and uses the console.

    Raises:
        WorkflowError: a setting or a file cannot be used; the message says which.
        OSError: the folder cannot be written to.
    """
    started = time.monotonic()
    if distributed.rank() > 0:
        console = Console(quiet=True, force_terminal=False)
    distributed.require_same("the settings", sweep.to_json())
    # The networks depend on what is in a folder of images, so it is read before anything is written.
    from_folder = sweep.run.dataset == "folder"
    raw, info = (
        read_image_folder(sweep.run, RunFolder(path).images, console)
        if from_folder
        else (None, INFO[sweep.run.dataset])
    )
    runtime = _runtime(device, sweep, info)
    if tensorboard:
        require_tensorboard()
    folder = on_rank_zero(lambda: open_folder(path, sweep, info, resume=resume, teacher_from=teacher_from))
    folder.read_config()  # checks that all processes see the folder
    if on_rank_zero(lambda: _unfinished(folder, sweep)):
        data = _data(sweep, raw or read_dataset(sweep.run.dataset, sweep.run.data_path), info, runtime)
        raw = None
        say(
            console,
            f"{title_of(info)}: {len(data.train):,} images for training, {len(data.validation):,} for validation, "
            f"{len(data.test):,} for the test; {runtime}",
        )
        if sweep.run.student.network:
            say(console, f"{sweep.run.student.network} is pruned in all layers; the report has no hidden width for it.")
        _train_all(Run(folder, data, runtime, console, tensorboard), sweep)
    on_rank_zero(lambda: write_report(folder, sweep, console))
    say(console, f"{time.monotonic() - started:.0f} s. The report is {folder.report}")


def _runtime(device: Device, sweep: SweepConfig, info: DatasetInfo) -> Runtime:
    for config in {job.config for point in points(sweep, {}) for job in point.jobs}:
        check_networks(config, info)
    check_own_networks(sweep.run, info)
    if sweep.run.compile and distributed.count() > 1:
        raise WorkflowError(
            f"--compile: expected False with {distributed.count()} processes, got True: torch.compile does not support "
            "the communication of batch normalisation"
        )
    runtime = Runtime(device, sweep.run.precision)
    distributed.require_same("the device and precision", f"{runtime.device.type} {runtime.dtype}")
    return runtime


def _data(sweep: SweepConfig, raw: RawDataset, info: DatasetInfo, runtime: Runtime) -> ImageData:
    config, count = sweep.run, distributed.count()
    data = ImageData(raw, info, config, runtime.device)
    for option, batch_size in (("teacher", config.teacher.batch_size), ("student", config.student.batch_size)):
        images = min(batch_size, len(data.train))
        if images % count:
            raise OptionError(f"{option}.batch-size", f"a multiple of {count} (the processes)", images)
    if not len(data.validation) and (config.student.select == "best" or config.student.patience):
        raise OptionError("validation", "images for --select best or --student.patience", 0)
    return data


def _train_all(run: Run, sweep: SweepConfig) -> None:
    """Train until every job is finished, here or in another process."""
    teacher_job = points(sweep, {})[0].jobs[0]
    with claimed(run, teacher_job, wait=True):
        teacher = train_teacher(run, teacher_job)
    logits = TeacherLogits(teacher, run.data, sweep.run.student.shift, run.folder.teacher_logits, run.runtime)
    while left := on_rank_zero(lambda: _unfinished(run.folder, sweep)):
        if not any(train_student(run, job, logits) for job in left):
            time.sleep(_WAIT)


def _unfinished(folder: RunFolder, sweep: SweepConfig) -> list[Job]:
    """The jobs that are known now and not finished: the teacher, then those of the first seed."""
    jobs = [job for point in folder.points(sweep) for job in point.jobs]
    jobs.sort(key=lambda job: -1 if job.name == TEACHER else sweep.seeds.index(job.config.seed))
    return [job for job in {job.name: job for job in jobs}.values() if folder.read_result(job.name) is None]


@contextmanager
def claimed(run: Run, job: Job, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a job's folder, on the first process for all; yields whether it is held."""
    path = run.folder.job(job.name)
    on_rank_zero(lambda: path.mkdir(exist_ok=True))
    with distributed.held_on_rank_zero(locked(path, wait=wait)) as held:
        yield held


def _is_finished(run: Run, job: Job) -> bool:
    return on_rank_zero(lambda: run.folder.read_result(job.name) is not None)


def train_teacher(run: Run, job: Job) -> nn.Module:
    """Train the teacher, or continue after its last checkpoint; returns it in evaluation mode."""
    model = build_teacher(job.config, run.data.info)
    if isinstance(model, FastTeacher):
        model.whiten(run.data.example(_WHITENING_IMAGES).cpu())
    return train_job(run, job, model, teacher_recipe(job.config), None).model.eval()


def train_student(run: Run, job: Job, logits: TeacherLogits) -> bool:
    """Train a student, or continue after its last checkpoint; returns False if another process trains it."""
    with claimed(run, job, wait=False) as held:
        if not held or _is_finished(run, job):
            return False
        recipe, model = student_recipe(job.config, job.stage), build_student(job.config, run.data.info)
        train_job(run, job, model, recipe, logits if recipe.loss.alpha > 0 else None)
        return True


def train_job(
    run: Run,
    job: Job,
    model: nn.Module,
    recipe: Recipe,
    logits: TeacherLogits | None,
    history: kddp_ext.PruningHistory | None = None,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Training:
    """Train `model`, from which `history` was pruned before, or continue after the last checkpoint; then measure it.

    `prepare` changes what no checkpoint holds, in a model that is new or was built again.
    """
    training = _restore_or_start(run, job, model, recipe, history, prepare)
    if _is_finished(run, job) and len(training.epochs) == recipe.epochs:
        return training
    on_rank_zero(lambda: remove_leftovers(run.folder.job(job.name)))
    if training.epochs:  # a killed process may have written the checkpoint and not yet the metrics
        on_rank_zero(lambda: _write_metrics(run, job, training, recipe))
    _distribute(run, training, recipe)
    latest_line = time.monotonic()
    with run.console.status(job.name) as status:

        def epoch_done(metrics: dict[str, Any]) -> None:
            nonlocal latest_line
            on_rank_zero(lambda: _save(run, job, training, recipe))
            line = f"{job.name:<8} {_progress_of(metrics, recipe.epochs)}"
            status.update(line)
            if not run.console.is_terminal and time.monotonic() - latest_line > _LINE_SECONDS:
                latest_line = time.monotonic()
                say(run.console, line)

        train(training, recipe, run.data, logits, run.runtime, epoch_done)
    if not recipe.epochs:  # a teacher that came with weights
        on_rank_zero(lambda: _save(run, job, training, recipe))
    model, history = _selected(run, job, training)
    if job.stage != "teacher":
        on_rank_zero(lambda: save_student(run, job, model, history))
    result = _measure(run, job, model, history, training.epochs)
    on_rank_zero(lambda: write_json(run.folder.result(job.name), result))
    width = f", width {result['width']:,}" if result["width"] is not None else ""
    seconds = sum(epoch["seconds"]["epoch"] for epoch in training.epochs)
    say(
        run.console,
        f"{job.name:<8} {result['test_accuracy']:.2%} test accuracy, {result['parameters']:,} parameters{width}, "
        f"{seconds:.0f} s",
    )
    for warning in result["warnings"]:
        say(run.console, f"warning: {job.name}: {warning}", style="yellow")
    return training


def _progress_of(metrics: dict[str, Any], epochs: int) -> str:
    """Such as "epoch 3/20, val 85.1%, width 300"."""
    width = f", width {metrics['width']:,}" if "width" in metrics else ""
    validation = metrics["validation_accuracy"]
    score = f"train {metrics['train_accuracy']:.1%}" if validation is None else f"val {validation:.1%}"
    return f"epoch {metrics['epoch']}/{epochs}, {score}{width}"


def _distribute(run: Run, training: Training, recipe: Recipe) -> None:
    """Average gradients over the processes, if there are several. The pruner must have traced the model before.

    On GPUs, batch normalisation uses the mean and the variance over all processes. On CPUs, where PyTorch has no
    SyncBatchNorm, each process uses those of its own part of the batch (see `average_buffers`).
    """
    if distributed.count() == 1:
        return
    distributed.require_same("the finished epochs", len(training.epochs))
    if run.runtime.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(training.model)
    training.network = DistributedDataParallel(
        training.model, forward_sync_buffers=False, find_unused_parameters=bool(recipe.frozen_from)
    )


def _restore_or_start(
    run: Run,
    job: Job,
    model: nn.Module,
    recipe: Recipe,
    history: kddp_ext.PruningHistory | None,
    prepare: Callable[[nn.Module], nn.Module],
) -> Training:
    model = prepare(run.runtime.place(model))
    path = run.folder.checkpoint(job.name)
    if not path.exists():
        return start_training(run, job, model, recipe, history)
    saved = load_checkpoint(path, job.stage)
    try:
        # A pruned student is a fresh one, narrowed by its history.
        if saved["history"] is not None:
            model = prepare(run.runtime.place(build_student(job.config, run.data.info)))
            history = kddp_ext.PruningHistory.from_json(saved["history"])
            history.replay(model, (run.data.example(2),))
        model.load_state_dict(saved["model"])
        training = start_training(run, job, model, recipe, history)
        for optimizer, state in zip(training.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if training.pruner is not None:
            training.pruner.load_state_dict(saved["pruner"])
        training.epochs = saved["epochs"]
    except WorkflowError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise WorkflowError(f"{path} does not fit this run: {' '.join(str(error).split())}") from error
    return training


def make_pruner(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    pruning: PruningConfig,
    images: Tensor,
    **options: Any,
) -> kddp_ext.DynamicPruner:
    """A pruner by the settings of a run; `options` are other arguments of `DynamicPruner`."""
    return kddp_ext.DynamicPruner(
        model,
        optimizers,
        example_inputs=(images,),
        layers=["hidden"] if pruning.layers == "hidden" else None,
        criterion=pruning.criterion,
        threshold=pruning.threshold,
        patience=1 if pruning.when == "at-the-end" else pruning.patience,  # there is only one check
        minimum_width=pruning.minimum_width,
        round_to=pruning.round_to,
        target_macs=pruning.target_macs or None,
        target_parameters=pruning.target_parameters or None,
        resource=pruning.resource if pruning.criterion == "saliency" else None,
        loss_budget=pruning.loss_budget or None,
        compensate=pruning.compensate,
        reconstruction_samples=pruning.reconstruction_samples if pruning.compensate else 0,
        **options,
    )


def start_training(
    run: Run, job: Job, model: nn.Module, recipe: Recipe, history: kddp_ext.PruningHistory | None = None
) -> Training:
    """The state in which a training of `model` begins; `history` is what was pruned from it before."""
    optimizers, pruning, pruner = recipe.optimizers(model), job.config.pruning, None
    if job.stage == "kddp":
        steps = max(1, len(run.data.train) // recipe.batch_size)
        pruner = make_pruner(
            model,
            optimizers,
            pruning,
            run.data.example(2),
            target_steps=max(1, recipe.checks(steps)),
            history=history,
            interval=pruning.steps or None,
            start=recipe.first_step(steps),
        )
    network = compiled(model) if job.config.compile else model  # after the pruner has traced the model
    return Training(model, network, optimizers, pruner, epochs=[], compiled=job.config.compile)


def _save(run: Run, job: Job, training: Training, recipe: Recipe) -> None:
    pruner, epochs = training.pruner, training.epochs
    # Before the checkpoint: a run that is killed between the two repeats this epoch, and writes the same again.
    if job.stage != "teacher" and len(run.data.validation) and best_epoch(epochs) == len(epochs):
        save_student(run, job, training.model, training.history, run.folder.best(job.name))
    save_checkpoint(
        run.folder.checkpoint(job.name),
        {
            "stage": job.stage,
            "model": training.model.state_dict(),
            "optimizers": [each.state_dict() for each in training.optimizers],
            "pruner": None if pruner is None else pruner.state_dict(),
            "history": None if pruner is None else training.history.to_json(),
            "epochs": training.epochs,
        },
    )
    _write_metrics(run, job, training, recipe)


def _write_metrics(run: Run, job: Job, training: Training, recipe: Recipe) -> None:
    run.folder.write_epochs(job.name, training.epochs)
    if run.tensorboard:
        images = len(run.data.train) // recipe.batch_size * recipe.batch_size or len(run.data.train)
        write_events(run.folder.tensorboard(job.name), training.epochs, images)


def save_student(
    run: Run, job: Job, model: nn.Module, history: kddp_ext.PruningHistory, path: Path | None = None
) -> None:
    """Write a student with everything that is needed to load it; the default for `path` is the finished student's."""
    metadata = {
        "stage": job.stage,
        "config": json.dumps(job.config.to_json()),
        "data": json.dumps(dataclasses.asdict(run.data.info)),
    }
    kddp_ext.save_student(path or run.folder.student(job.name), model, history, metadata)


def _is_best_selected(job: Job) -> bool:
    return job.stage != "teacher" and job.config.student.select == "best"


def _selected(run: Run, job: Job, training: Training) -> tuple[nn.Module, kddp_ext.PruningHistory]:
    """The model of the last epoch, or of the best one, and what was pruned from it."""
    if not _is_best_selected(job):
        return training.model, training.history
    saved = read_student(run.folder.best(job.name))
    assert saved.history is not None
    return run.runtime.place(saved.load({"student": job.config.student.network})), saved.history


def _measure(
    run: Run, job: Job, model: nn.Module, history: kddp_ext.PruningHistory, epochs: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of the report, except times. Only this function looks at the test images."""
    student = run.folder.student(job.name)
    hidden = dict(model.named_modules()).get("hidden") if job.config.has_hidden_layer else None
    hidden = hidden if isinstance(hidden, nn.Linear) else None
    validation, counts = run.data.validation, confusion(model, run.data, run.data.test, run.runtime)
    result: dict[str, Any] = {
        "stage": job.stage,
        "epoch": best_epoch(epochs) if _is_best_selected(job) else len(epochs),
        "test_accuracy": share_correct(counts),
        "validation_accuracy": accuracy(model, run.data, validation, run.runtime) if len(validation) else None,
        "parameters": count_parameters(model),
        "linear_parameters": sum(count_parameters(each) for each in model.modules() if isinstance(each, nn.Linear)),
        "macs": count_macs(model, run.data.example()),
        "bytes": student.stat().st_size if job.stage != "teacher" else None,
        "width": None if hidden is None else hidden.out_features,
        "active": None if hidden is None else count_active(model, hidden, run.data, run.runtime),
        "widths": history.widths,
        "confusion": nonzero_counts(counts),
    }
    if job.stage == "teacher" and run.data.augment:
        result["test_accuracy_with_views"] = accuracy(model, run.data, run.data.test, run.runtime, views=True)
    classes, images = run.data.info.classes, len(run.data.test)
    warnings = collapse_warnings(job, result, epochs, classes, images)
    if job.stage == "kddp" and history.widths == history.original_widths:
        threshold = job.config.pruning.threshold
        warnings.append(f"nothing was removed; try a larger --pruning.threshold (now {threshold:g}) or penalty")
    return {**result, "warnings": warnings}


def collapse_warnings(
    job: Job, result: dict[str, Any], epochs: list[dict[str, Any]], classes: int, test_images: int
) -> list[str]:
    """Say whether a training collapsed, and the likely cause.

    It collapsed if all activations of the hidden layer are zero at the end, or of a pruned layer at the last check, or
    if its accuracy is within two standard errors of guessing, p + 2 √(p (1 - p) / test_images) with p = 1 / classes.
    """
    network = "teacher" if job.stage == "teacher" else "student"
    advice = f"try a smaller --{network}.learning-rate (now {getattr(job.config, network).learning_rate:g})"
    if job.stage == "kddp" and job.config.pruning.l1_weight:
        advice = (
            "the L1 penalty is the likely cause: try a smaller --pruning.l1-weight "
            f"(now {job.config.pruning.l1_weight:g}) or a longer --pruning.l1-warmup"
        )
    elif network == "student":
        advice += " or, if the teacher learned nothing, train it longer"
    elif network == "teacher" and job.config.teacher.has_weights:
        advice = (
            "check that it was trained for these classes in this order, and what it expects of its input "
            "(--teacher.mean, --teacher.std, --size)"
        )
    chance = 1 / classes
    margin = 2 * math.sqrt(chance * (1 - chance) / test_images)
    layers: list[str] = next((epoch["collapsed"] for epoch in epochs[:-3:-1] if "collapsed" in epoch), [])
    layers = ["hidden"] if result["active"] == 0 else layers
    if layers:
        return [f"every activation of the layer {', '.join(layers)} is zero, or nearly so; {advice}"]
    if result["test_accuracy"] <= chance + margin:
        accuracy = f"the test accuracy of {result['test_accuracy']:.1%}"
        return [f"{accuracy} is no better than guessing ({chance:.1%} ± {margin:.1%}); {advice}"]
    return []
