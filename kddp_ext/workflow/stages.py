"""One training from its initial weights to its figures: of the teacher, or of a student."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import kddp_ext
from kddp_ext.files import remove_leftovers
from kddp_ext.workflow.checkpoint import architecture, check_architecture, load_checkpoint, save_checkpoint
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.distributed import data_parallel
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.job import Job
from kddp_ext.workflow.measure import accuracy, count_active, count_macs, count_parameters
from kddp_ext.workflow.models import build_student, build_teacher, prepare_teacher
from kddp_ext.workflow.progress import Bar, Progress
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.tensorboard import Write, event_files
from kddp_ext.workflow.train import Recipe, Training, compiled, student_recipe, teacher_recipe, train

# Enough patches to know their principal components.
_WHITENING_IMAGES = 2000


@dataclass(frozen=True)
class Run:
    """What all trainings share.

    Attributes:
        folder: where they are kept.
        data: what they train on.
        runtime: where they compute, and by which processes.
        progress: shows it.
        tensorboard: whether event files are written too.
    """

    folder: RunFolder
    data: ImageData
    runtime: Runtime
    progress: Progress
    tensorboard: bool = False


def train_teacher(run: Run, job: Job) -> nn.Module:
    """Train the teacher, or go on where a killed run stopped; returns it ready for use."""
    model = build_teacher(job.config, run.data.info)
    first = torch.arange(min(_WHITENING_IMAGES, len(run.data.train)), device=run.runtime.device)
    prepare_teacher(model, run.data.normalise(run.data.train.images[first]).cpu())
    return _train_job(run, job, model, teacher_recipe(job.config), teacher=None).model.eval()


def train_student(run: Run, job: Job, teacher: TeacherLogits) -> None:
    """Train a student, or go on where a killed run stopped."""
    if _finished(run, job):
        return
    model = build_student(job.config, run.data.info)
    recipe = student_recipe(job.config, job.stage)
    _train_job(run, job, model, recipe, teacher if recipe.alpha > 0 else None)


def _train_job(run: Run, job: Job, model: nn.Module, recipe: Recipe, teacher: TeacherLogits | None) -> Training:
    processes = run.runtime.processes
    processes.on_rank_zero(lambda: run.folder.job(job.name).mkdir(parents=True, exist_ok=True))
    training = processes.all_or_raise(lambda: _restore_or_start(run, job, run.runtime.place(model), recipe))
    if _finished(run, job) and len(training.epochs) == recipe.epochs:
        return training
    processes.on_rank_zero(lambda: _tidy(run, job, training))
    _distribute(run, training, recipe)

    images = len(run.data.train) // recipe.batch_size * recipe.batch_size or len(run.data.train)
    with (
        _event_files(run, job, training, images) as write_events,
        run.progress.bar(job.name, images * recipe.epochs, images * len(training.epochs)) as bar,
    ):

        def epoch_done(metrics: dict[str, Any]) -> None:
            processes.on_rank_zero(lambda: _save(run, job, training))
            write_events(metrics)
            _show(bar, metrics, recipe.epochs)

        train(training, recipe, run.data, teacher, run.runtime, advance=bar.advance, epoch_done=epoch_done)
    if job.stage != "teacher":
        processes.on_rank_zero(lambda: _save_student(run, job, training))
    result = _measure(run, job, training)
    processes.on_rank_zero(lambda: run.folder.write_result(job.name, result, training.epochs))
    run.progress.line(_summary(job, result, training))
    return training


def _tidy(run: Run, job: Job, training: Training) -> None:
    """Make up for what a process that was killed had no time for: after a checkpoint come its metrics."""
    remove_leftovers(run.folder.job(job.name))
    if training.epochs:
        run.folder.write_epochs(job.name, training.epochs)


def _finished(run: Run, job: Job) -> bool:
    return run.runtime.processes.on_rank_zero(lambda: run.folder.read_result(job.name) is not None)


def _distribute(run: Run, training: Training, recipe: Recipe) -> None:
    """Train on the batches of all processes, where there are several. Not before the pruner has traced the model."""
    processes = run.runtime.processes
    if processes.count == 1:
        return
    processes.require_same("the finished epochs", len(training.epochs))
    training.network = data_parallel(training.model, find_unused_parameters=bool(recipe.frozen_from))


def _event_files(run: Run, job: Job, training: Training, images: int) -> AbstractContextManager[Write]:
    if not run.tensorboard or not run.runtime.processes.is_first:
        return nullcontext(lambda _metrics: None)
    return event_files(run.folder.tensorboard(job.name), training.epochs, images)


def _restore_or_start(run: Run, job: Job, model: nn.Module, recipe: Recipe) -> Training:
    path = run.folder.checkpoint(job.name)
    saved = load_checkpoint(path, job.stage) if path.exists() else None
    if saved is None:
        return start_training(run, job, model, recipe)
    try:
        # A pruned student is the fresh one, shrunk by its history.
        if saved["history"] is not None:
            history = kddp_ext.PruningHistory.from_json(saved["history"])
            history.replay(model, (run.data.example(2),))
        check_architecture(path, saved["architecture"], model)
        model.load_state_dict(saved["model"])
        training = start_training(run, job, model, recipe)
        training.optimizer.load_state_dict(saved["optimizer"])
        if training.pruner is not None:
            training.pruner.load_state_dict(saved["pruner"])
        training.epochs = saved["epochs"]
    except WorkflowError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise WorkflowError(f"{path} does not fit this run: {error}") from error
    return training


def start_training(run: Run, job: Job, model: nn.Module, recipe: Recipe) -> Training:
    """What a training of `model` begins with."""
    optimizer = recipe.optimizer(model)
    pruner = _pruner(run, job, model, optimizer) if job.stage == "kddp" else None
    network = compiled(model) if job.config.compile else model  # not before the pruner has traced the model
    return Training(model, network, optimizer, pruner, epochs=[], compiled=job.config.compile)


def _pruner(run: Run, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> kddp_ext.DynamicPruner:
    pruning = job.config.pruning
    return kddp_ext.DynamicPruner(
        model,
        optimizer,
        example_inputs=(run.data.example(2),),
        layers=["hidden"] if pruning.layers == "hidden" else None,
        criterion=pruning.criterion,
        threshold=pruning.threshold,
        patience=1 if pruning.when == "at-the-end" else pruning.patience,  # there is one check only
        minimum_width=pruning.minimum_width,
        round_to=pruning.round_to,
        compensate=pruning.compensate,
        reconstruction_samples=pruning.reconstruction_samples if pruning.compensate else 0,
    )


def _save(run: Run, job: Job, training: Training) -> None:
    pruner = training.pruner
    save_checkpoint(
        run.folder.checkpoint(job.name),
        {
            "stage": job.stage,
            "architecture": architecture(training.model),
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "pruner": None if pruner is None else pruner.state_dict(),
            "history": None if pruner is None else pruner.history.to_json(),
            "epochs": training.epochs,
        },
    )
    run.folder.write_epochs(job.name, training.epochs)


def _save_student(run: Run, job: Job, training: Training) -> None:
    pruner = training.pruner
    history = kddp_ext.PruningHistory({}) if pruner is None else pruner.history
    metadata = {"stage": job.stage, "config": json.dumps(job.config.to_json())}
    kddp_ext.save_student(run.folder.student(job.name), training.model, history, metadata)


def _measure(run: Run, job: Job, training: Training) -> dict[str, Any]:
    """The figures of the report, but for times. This is the one time that a training sees the test images."""
    model = training.model
    result: dict[str, Any] = {
        "stage": job.stage,
        "test_accuracy": accuracy(model, run.data, run.data.test, run.runtime),
        "validation_accuracy": training.epochs[-1]["validation_accuracy"],
        "parameters": count_parameters(model),
        "macs": count_macs(model, run.data.example()),
    }
    if job.stage == "teacher":
        if run.data.augment:
            result["test_accuracy_with_views"] = accuracy(model, run.data, run.data.test, run.runtime, views=True)
        return {**result, "width": None}
    module = dict(model.named_modules()).get("hidden")
    hidden = module if isinstance(module, nn.Linear) else None
    return {
        **result,
        "width": None if hidden is None else hidden.out_features,
        "active": None if hidden is None else count_active(model, hidden, run.data, run.runtime),
        "widths": {} if training.pruner is None else training.pruner.widths,
        "linear_parameters": sum(count_parameters(layer) for layer in model.modules() if isinstance(layer, nn.Linear)),
        "bytes": run.folder.student(job.name).stat().st_size,
    }


def _show(bar: Bar, metrics: dict[str, Any], epochs: int) -> None:
    width = f", width {metrics['width']}" if "width" in metrics else ""
    validation = metrics["validation_accuracy"]
    seen = f"train {metrics['train_accuracy']:.1%}" if validation is None else f"val {validation:.1%}"
    bar.note(f"epoch {metrics['epoch']}/{epochs}, {seen}{width}")


def _summary(job: Job, result: dict[str, Any], training: Training) -> str:
    width = f", width {result['width']}" if result["width"] is not None else ""
    seconds = sum(epoch["seconds"]["epoch"] for epoch in training.epochs)
    return (
        f"{job.name:<8} {result['test_accuracy']:.2%} of the test images, "
        f"{result['parameters']:,} parameters{width}, {seconds:.0f} s"
    )
