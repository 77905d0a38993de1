"""The training loop: one for all four stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import kddp_ext
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.measure import accuracy, count_parameters
from kddp_ext.workflow.run_folder import Stage
from kddp_ext.workflow.runtime import PhaseClock, Runtime
from kddp_ext.workflow.teacher_cache import TeacherLogits


@dataclass(frozen=True)
class Recipe:
    """How one stage trains.

    Attributes:
        stage: its name.
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: the value for a position in the training, 0 at its start to 1 at its end.
        optimizer: makes the optimizer of a model's parameters.
        alpha: weight of the teacher; 0 trains on the labels alone.
        temperature: of the distillation.
        divergence: the loss's arguments that name and shape the divergence.
        l1_weight: of the penalty on the activations of the layers that are pruned.
        label_smoothing: of the labels.
    """

    stage: Stage
    epochs: int
    batch_size: int
    learning_rate: Callable[[float], float]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Mapping[str, Any] = field(default_factory=dict)
    l1_weight: float = 0.0
    label_smoothing: float = 0.0


@dataclass
class Training:
    """A model in training: everything that a checkpoint holds.

    Attributes:
        model: the network, on the run's device.
        optimizer: holds its parameters.
        pruner: present in the stage that prunes.
        epochs: the metrics of each finished epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: kddp_ext.DynamicPruner | None
    epochs: list[dict[str, Any]]


def teacher_recipe(config: RunConfig) -> Recipe:
    """SGD with Nesterov momentum and a triangular learning rate."""
    teacher = config.teacher
    return Recipe(
        stage="teacher",
        epochs=teacher.epochs,
        batch_size=teacher.batch_size,
        learning_rate=lambda position: teacher.learning_rate * triangle(position),
        optimizer=lambda model: torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=teacher.learning_rate,
            momentum=teacher.momentum,
            nesterov=teacher.momentum > 0,
            weight_decay=teacher.weight_decay,
        ),
        label_smoothing=teacher.label_smoothing,
    )


def student_recipe(config: RunConfig, stage: Stage) -> Recipe:
    """Adam with a cosine schedule, the same for every student but for the terms of the loss."""
    student = config.student
    return Recipe(
        stage=stage,
        epochs=student.epochs,
        batch_size=student.batch_size,
        learning_rate=lambda position: student.learning_rate * (1 + math.cos(math.pi * position)) / 2,
        optimizer=lambda model: torch.optim.Adam(
            model.parameters(), lr=student.learning_rate, weight_decay=student.weight_decay
        ),
        alpha=0.0 if stage == "scratch" else config.distillation.alpha,
        temperature=config.distillation.temperature,
        divergence={
            "divergence": config.distillation.divergence,
            "jsd_beta": config.distillation.jsd_beta,
            "dkd_target_weight": config.distillation.dkd_target_weight,
            "dkd_non_target_weight": config.distillation.dkd_non_target_weight,
            "standardize_logits": config.distillation.standardize_logits,
        },
        l1_weight=config.pruning.l1_weight if stage == "kddp" else 0.0,
    )


def triangle(position: float, peak: float = 0.2) -> float:
    """Rises from 0 to 1 at `peak`, then falls to 0 at 1."""
    return position / peak if position < peak else (1 - position) / (1 - peak)


def train(
    training: Training,
    recipe: Recipe,
    data: ImageData,
    teacher: TeacherLogits | None,
    runtime: Runtime,
    *,
    advance: Callable[[int], None],
    epoch_done: Callable[[dict[str, Any]], None],
) -> None:
    """Train until `recipe.epochs` are done, from wherever `training` stands.

    Args:
        training: changed in place; `epochs` grows by one entry an epoch.
        teacher: its logits for each epoch, or None to train on the labels alone.
        advance: called with the number of images after each step.
        epoch_done: called with the metrics of each epoch, once `training` is ready to be saved.

    Raises:
        WorkflowError: the loss is no longer finite.
    """
    for epoch in range(len(training.epochs), recipe.epochs):
        metrics = train_epoch(training, recipe, data, teacher, runtime, epoch, advance)
        training.epochs.append(metrics)
        epoch_done(metrics)


def train_epoch(
    training: Training,
    recipe: Recipe,
    data: ImageData,
    teacher: TeacherLogits | None,
    runtime: Runtime,
    epoch: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """One pass over the training images, then the pruning; returns its metrics. Raises as `train` does."""
    model, optimizer, pruner = training.model, training.optimizer, training.pruner
    clock = PhaseClock(runtime.device)
    started = time.perf_counter()
    batches = list(data.batches(epoch, recipe.batch_size))

    teacher_logits = None
    if teacher is not None:
        with clock.phase("teacher"):
            teacher_logits = teacher.epoch(epoch)

    model.train()
    # loss, kd, ce, l1, correct: summed on the device and read once, after the epoch.
    sums = torch.zeros(5, dtype=torch.float64, device=runtime.device)
    for step, indices in enumerate(batches):
        learning_rate = recipe.learning_rate((epoch + step / len(batches)) / recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        with clock.phase("data"):
            images, labels = data.training_images(indices, epoch), data.train.labels[indices]
        with clock.phase("student"), runtime.autocast():
            logits = model(images)
        with clock.phase("loss"):
            loss, terms = kddp_ext.fused_kd_l1_loss(
                logits,
                None if teacher_logits is None else teacher_logits[indices],
                labels,
                () if pruner is None else pruner.activations,
                temperature=recipe.temperature,
                alpha=recipe.alpha,
                l1_weight=recipe.l1_weight,
                label_smoothing=recipe.label_smoothing,
                return_terms=True,
                **recipe.divergence,
            )
        with clock.phase("student"):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sums += torch.stack([loss.detach(), terms.kd, terms.ce, terms.l1, terms.correct])
        advance(len(indices))

    loss_mean, kd, ce, l1 = (sums[:4] / len(batches)).tolist()
    if not math.isfinite(loss_mean):
        raise WorkflowError(
            f"{recipe.stage}: the loss is {loss_mean} after epoch {epoch + 1}: the training diverged. "
            "Try a smaller learning rate."
        )
    # Not after the last epoch: what is removed there could no longer be made up for.
    if pruner is not None and epoch + 1 < recipe.epochs:
        with clock.phase("prune"):
            pruner.prune()
    with clock.phase("validation"):
        validation = accuracy(model, data, data.validation, runtime)

    images_seen = len(batches) * len(batches[0])
    metrics: dict[str, Any] = {
        "epoch": epoch + 1,
        "loss": loss_mean,
        "kd": kd,
        "cross_entropy": ce,
        "l1": l1,
        "train_accuracy": float(sums[4]) / images_seen,
        "validation_accuracy": validation,
        "parameters": count_parameters(model),
    }
    if pruner is not None:
        metrics["width"] = sum(pruner.widths.values())
    metrics["seconds"] = {"epoch": round(time.perf_counter() - started, 4), **clock.seconds()}
    return metrics
