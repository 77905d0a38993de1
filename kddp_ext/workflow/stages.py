"""The four stages of a run: the teacher, and the student trained alone, with KD, and with KDDP."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import kddp_ext
from kddp_ext.workflow.checkpoint import architecture, check_architecture, load_checkpoint, save_checkpoint
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.measure import accuracy, count_macs, count_parameters, latency
from kddp_ext.workflow.models import build_student, build_teacher
from kddp_ext.workflow.progress import Bar, Progress
from kddp_ext.workflow.run_folder import RunFolder, Stage
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.teacher_cache import TeacherLogits
from kddp_ext.workflow.trainer import Recipe, Training, student_recipe, teacher_recipe, train

# Enough patches to know their principal components.
_WHITENING_IMAGES = 2000
LATENCY_BATCHES = (1, 128)


@dataclass(frozen=True)
class Run:
    """What all stages share."""

    folder: RunFolder
    config: RunConfig
    data: ImageData
    runtime: Runtime
    progress: Progress


def run_teacher(run: Run) -> nn.Module:
    """Train the teacher, or go on where a killed run stopped; returns it ready for use."""
    model = build_teacher(run.config, run.data.info, run.config.seed)
    first = torch.arange(min(_WHITENING_IMAGES, len(run.data.train)), device=run.runtime.device)
    model.whiten(run.data.normalise(run.data.train.images[first]).cpu())
    recipe = teacher_recipe(run.config)
    return _run_stage(run, model, recipe, teacher=None).model.eval()


def run_student(run: Run, stage: Stage, teacher: TeacherLogits) -> None:
    """Train the student of one stage, or go on where a killed run stopped."""
    if run.folder.read_result(stage) is not None:
        return
    model = build_student(run.config, run.data.info, run.config.seed)
    recipe = student_recipe(run.config, stage)
    _run_stage(run, model, recipe, None if stage == "scratch" else teacher)


def _run_stage(run: Run, model: nn.Module, recipe: Recipe, teacher: TeacherLogits | None) -> Training:
    stage = recipe.stage
    run.folder.stage(stage).mkdir(exist_ok=True)
    model = run.runtime.place(model)
    training = _restore_or_start(run, model, recipe)
    if run.folder.read_result(stage) is not None:
        return training

    images = len(run.data.train) // recipe.batch_size * recipe.batch_size or len(run.data.train)
    with run.progress.bar(stage, images * recipe.epochs, images * len(training.epochs)) as bar:

        def epoch_done(metrics: dict[str, Any]) -> None:
            _save(run, stage, training)
            _show(bar, metrics, recipe.epochs)

        train(training, recipe, run.data, teacher, run.runtime, advance=bar.advance, epoch_done=epoch_done)
    result = _measure(run, stage, training)
    if stage != "teacher":
        _save_student(run, stage, training)
    run.folder.write_result(stage, result)
    run.progress.line(_summary(result))
    return training


def _restore_or_start(run: Run, model: nn.Module, recipe: Recipe) -> Training:
    stage = recipe.stage
    path = run.folder.checkpoint(stage)
    saved = load_checkpoint(path, stage) if path.is_file() else None
    if saved is None:
        return _start(run, model, recipe)
    try:
        # A pruned student is the fresh one, shrunk by its history.
        if saved["history"] is not None:
            history = kddp_ext.PruningHistory.from_json(saved["history"])
            history.replay(model, (run.data.example(2),))
        check_architecture(path, saved["architecture"], model)
        model.load_state_dict(saved["model"])
        training = _start(run, model, recipe)
        training.optimizer.load_state_dict(saved["optimizer"])
        if training.pruner is not None:
            training.pruner.load_state_dict(saved["pruner"])
        training.epochs = saved["epochs"]
    except WorkflowError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise WorkflowError(f"{path} does not fit this run: {error}") from error
    return training


def _start(run: Run, model: nn.Module, recipe: Recipe) -> Training:
    optimizer = recipe.optimizer(model)
    pruner = _pruner(run, model, optimizer) if recipe.stage == "kddp" else None
    return Training(model, optimizer, pruner, epochs=[])


def _pruner(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> kddp_ext.DynamicPruner:
    pruning = run.config.pruning
    return kddp_ext.DynamicPruner(
        model,
        optimizer,
        example_inputs=(run.data.example(2),),
        layers=["hidden"],  # the paper's penalty is on the fully-connected layer
        criterion=pruning.criterion,
        threshold=pruning.threshold,
        patience=pruning.patience,
        minimum_width=pruning.minimum_width,
        round_to=pruning.round_to,
        compensate=pruning.compensate,
    )


def _save(run: Run, stage: Stage, training: Training) -> None:
    pruner = training.pruner
    save_checkpoint(
        run.folder.checkpoint(stage),
        {
            "stage": stage,
            "architecture": architecture(training.model),
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "pruner": None if pruner is None else pruner.state_dict(),
            "history": None if pruner is None else pruner.history.to_json(),
            "epochs": training.epochs,
        },
    )
    run.folder.write_epochs(stage, training.epochs)


def _save_student(run: Run, stage: Stage, training: Training) -> None:
    pruner = training.pruner
    history = kddp_ext.PruningHistory({}) if pruner is None else pruner.history
    metadata = {"stage": stage, "config": json.dumps(run.config.to_json())}
    kddp_ext.save_student(run.folder.student(stage), training.model, history, metadata)


def _measure(run: Run, stage: Stage, training: Training) -> dict[str, Any]:
    """The figures of the report. This is the one time that a stage sees the test images."""
    model, image = training.model, run.data.example()
    seconds: dict[str, float] = {}
    for epoch in training.epochs:
        for phase, value in epoch["seconds"].items():
            seconds[phase] = round(seconds.get(phase, 0.0) + value, 3)
    return {
        "stage": stage,
        "test_accuracy": accuracy(model, run.data, run.data.test, run.runtime),
        "validation_accuracy": training.epochs[-1]["validation_accuracy"],
        "parameters": count_parameters(model),
        "width": None if stage == "teacher" else model.get_submodule("hidden").out_features,
        "macs": count_macs(model, image),
        "latency_ms": {str(batch): round(1000 * latency(model, image, batch), 4) for batch in LATENCY_BATCHES},
        "seconds": seconds,
    }


def _show(bar: Bar, metrics: dict[str, Any], epochs: int) -> None:
    width = f", width {metrics['width']}" if "width" in metrics else ""
    bar.note(f"epoch {metrics['epoch']}/{epochs}, val {metrics['validation_accuracy']:.1%}{width}")


def _summary(result: dict[str, Any]) -> str:
    width = f", width {result['width']}" if result["width"] is not None else ""
    return (
        f"{result['stage']:<8} {result['test_accuracy']:.2%} of the test images, "
        f"{result['parameters']:,} parameters{width}, {result['seconds']['epoch']:.0f} s"
    )
