"""The training loop: one for all four stages."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kddp_ext
from kddp_ext.workflow.config import PruningTime, RunConfig, TeacherConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.job import Stage
from kddp_ext.workflow.measure import accuracy, count_parameters
from kddp_ext.workflow.models import FastTeacher
from kddp_ext.workflow.muon import FILTER_MOMENTUM, Muon
from kddp_ext.workflow.runtime import PhaseClock, Runtime
from kddp_ext.workflow.teacher_logits import TeacherLogits


@dataclass(frozen=True)
class Recipe:
    """How one stage trains.

    Attributes:
        stage: its name.
        seed: of the order of the images.
        epochs: passes over the training images.
        batch_size: images per step, of all processes together.
        learning_rate: the value for a position in the training, 0 at its start to 1 at its end.
        optimizer: makes the optimizer of a model's parameters.
        alpha: weight of the teacher; 0 trains on the labels alone.
        temperature: of the distillation.
        divergence: the loss's arguments that name and shape the divergence.
        l1_weight: of the penalty on the activations of the layers that are pruned, at its full height.
        l1_warmup: epochs over which it rises to that, linearly.
        l1_until: position from which on there is none.
        label_smoothing: of the labels.
        shift: the most pixels that augmented images move by.
        frozen_from: parameters by name, and the epoch, counted from 0, from which on they learn no more.
        views: how many views of the images the epochs take in turn; 0 for a new one in each.
        prune_when: after every epoch but the last, or once, after that.
    """

    stage: Stage
    seed: int
    epochs: int
    batch_size: int
    learning_rate: Callable[[float], float]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Mapping[str, Any] = field(default_factory=dict)
    l1_weight: float = 0.0
    l1_warmup: int = 0
    l1_until: float = 1.0
    label_smoothing: float = 0.0
    frozen_from: Mapping[str, int] = field(default_factory=dict)
    shift: int = 0
    views: int = 0
    prune_when: PruningTime = "every-epoch"

    def l1_weight_at(self, position: float) -> float:
        """The penalty's weight at a position in the training, 0 at its start to 1 at its end."""
        if position >= self.l1_until:
            return 0.0
        return self.l1_weight * min(1.0, position * self.epochs / self.l1_warmup if self.l1_warmup else 1.0)

    def view(self, epoch: int) -> int:
        """The number of the view that `epoch` trains on."""
        return epoch % self.views if self.views else epoch


@dataclass
class Training:
    """A model in training: everything that a checkpoint holds.

    Attributes:
        model: the network, on the run's device.
        network: what a step calls: the model itself, or what compiles or distributes it.
        optimizer: holds its parameters.
        pruner: present in the stage that prunes.
        epochs: the metrics of each finished epoch.
        compiled: whether `network` is what `compiled` returned.
    """

    model: nn.Module
    network: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    pruner: kddp_ext.DynamicPruner | None
    epochs: list[dict[str, Any]]
    compiled: bool = False


def teacher_recipe(config: RunConfig) -> Recipe:
    """SGD with a triangular learning rate, or Muon with one that falls all along."""
    teacher = config.teacher
    schedule = triangle if teacher.optimizer == "sgd" else lambda position: 1 - position
    return Recipe(
        stage="teacher",
        seed=teacher.seed,
        epochs=teacher.epochs,
        batch_size=teacher.batch_size,
        learning_rate=lambda position: teacher.learning_rate * schedule(position),
        optimizer=lambda model: _teacher_optimizer(model, teacher),
        label_smoothing=teacher.label_smoothing,
        frozen_from=FastTeacher.frozen_from if teacher.architecture == "fast" else {},
        shift=teacher.shift,
    )


def _teacher_optimizer(model: nn.Module, teacher: TeacherConfig) -> torch.optim.Optimizer:
    orthogonal = teacher.optimizer == "muon"
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    filters = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if orthogonal and parameter.ndim == 4:
            filters.append(parameter)
        elif name.endswith("bias"):
            groups[teacher.bias_learning_rate].append(parameter)
        else:
            last = name.startswith("classifier")
            groups[teacher.classifier_learning_rate if last else 1.0].append(parameter)
    others = [
        {"params": parameters, "scale": scale, "weight_decay": teacher.weight_decay / scale}  # decay follows the rate
        for scale, parameters in groups.items()
    ]
    if orthogonal:
        others.append({"params": filters, "orthogonalize": True, "momentum": FILTER_MOMENTUM})
        return Muon(others, lr=teacher.learning_rate, momentum=teacher.momentum)
    return torch.optim.SGD(
        others, lr=teacher.learning_rate, momentum=teacher.momentum, nesterov=teacher.momentum > 0, fused=True
    )


def student_recipe(config: RunConfig, stage: Stage) -> Recipe:
    """Adam with a cosine schedule, the same for every student but for the terms of the loss."""
    student = config.student
    return Recipe(
        stage=stage,
        seed=config.seed,
        epochs=student.epochs,
        batch_size=student.batch_size,
        learning_rate=lambda position: student.learning_rate * (1 + math.cos(math.pi * position)) / 2,
        optimizer=lambda model: torch.optim.Adam(
            model.parameters(), lr=student.learning_rate, weight_decay=student.weight_decay, fused=True
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
        l1_warmup=config.pruning.l1_warmup,
        l1_until=config.pruning.l1_until,
        shift=student.shift,
        views=student.views,
        prune_when=config.pruning.when,
    )


def triangle(position: float, peak: float = 0.23, start: float = 0.2) -> float:
    """Rises from `start` to 1 at `peak`, then falls to 0 at 1."""
    if position < peak:
        return start + (1 - start) * position / peak
    return (1 - position) / (1 - peak)


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
        teacher: its logits for each view, or None to train on the labels alone.
        advance: called with the number of images after each step.
        epoch_done: called with the metrics of each epoch, once `training` is ready to be saved.

    Raises:
        WorkflowError: the loss is no longer finite.
    """
    for epoch in range(len(training.epochs), recipe.epochs):
        for name, start in recipe.frozen_from.items():
            training.model.get_parameter(name).requires_grad_(epoch < start)
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
    clock = PhaseClock(runtime.device)
    started = time.perf_counter()
    view = recipe.view(epoch)
    with clock.phase("teacher"):
        teacher_logits = None if teacher is None else teacher.view(view)

    training.model.train()
    processes = runtime.processes
    batches = [processes.share(batch) for batch in data.batches(epoch, recipe.batch_size, recipe.seed)]
    totals = torch.zeros(len(_TERMS), dtype=torch.float64, device=runtime.device)
    for step, indices in enumerate(batches):
        position = (epoch + step / len(batches)) / recipe.epochs
        with clock.phase("data"):
            images, labels = data.training_images(indices, view, recipe.shift), data.train.labels[indices]
            guidance = None if teacher_logits is None else teacher_logits[indices]
        totals += _train_step(training, recipe, runtime, clock, position, images, labels, guidance)
        advance(len(indices) * processes.count)

    processes.average_buffers(training.model)
    # The epoch's one transfer to the host: each step's sums stayed on the device.
    totals = processes.sum(totals) / processes.count
    means = dict(zip(_TERMS, (totals / len(batches)).tolist(), strict=True))
    processes.all_or_raise(lambda: _require_finite(means["loss"], recipe, epoch))
    if training.pruner is not None:
        with clock.phase("prune"):
            pruned = _prune(training.pruner, recipe, epoch)
        if pruned and training.compiled:
            training.network = compiled(training.model)
    with clock.phase("validation"):
        validation = accuracy(training.model, data, data.validation, runtime) if len(data.validation) else None
    seconds = {"epoch": round(time.perf_counter() - started, 4), **clock.seconds()}
    return _metrics(training, epoch, means, len(batches[0]), validation, seconds)


_TERMS = ("loss", "kd", "cross_entropy", "l1", "correct")


def _train_step(
    training: Training,
    recipe: Recipe,
    runtime: Runtime,
    clock: PhaseClock,
    position: float,
    images: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
) -> Tensor:
    """One step of the optimizer; returns what `_TERMS` names, on the device: nothing here waits for it."""
    for group in training.optimizer.param_groups:
        group["lr"] = recipe.learning_rate(position) * group.get("scale", 1.0)
    with clock.phase("student"), runtime.autocast():
        logits = training.network(images)
    with clock.phase("loss"):
        loss, terms = kddp_ext.fused_kd_l1_loss(
            logits,
            teacher_logits,
            labels,
            () if training.pruner is None else training.pruner.activations,
            temperature=recipe.temperature,
            alpha=recipe.alpha,
            l1_weight=recipe.l1_weight_at(position),
            label_smoothing=recipe.label_smoothing,
            return_terms=True,
            **recipe.divergence,
        )
    with clock.phase("student"):
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
    return torch.stack([loss.detach(), terms.kd, terms.ce, terms.l1, terms.correct])


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`model` through torch.compile, for the shapes that it has now.

    What was compiled before is forgotten: so a run that was resumed computes with the same kernels as one that was
    not interrupted, and after many prunes torch's limit of recompilations, beyond which it runs the model as it is,
    is not reached.
    """
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


def _prune(pruner: kddp_ext.DynamicPruner, recipe: Recipe, epoch: int) -> bool:
    """Whether something was removed."""
    last = epoch + 1 == recipe.epochs
    # Not every-epoch's last: what is removed there could no longer be made up for.
    if last == (recipe.prune_when == "at-the-end"):
        return pruner.prune().neurons_pruned > 0
    pruner.reset()  # a check judges the epoch before it alone
    return False


def _require_finite(loss: float, recipe: Recipe, epoch: int) -> None:
    if not math.isfinite(loss):
        raise WorkflowError(
            f"{recipe.stage}: the loss is {loss} after epoch {epoch + 1}: the training diverged. "
            "Try a smaller learning rate."
        )


def _metrics(
    training: Training,
    epoch: int,
    means: dict[str, float],
    batch_size: int,
    validation: float | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "epoch": epoch + 1,
        **{term: means[term] for term in _TERMS[:-1]},
        "train_accuracy": means["correct"] / batch_size,
        "validation_accuracy": validation,
        "parameters": count_parameters(training.model),
    }
    if training.pruner is not None:
        metrics["width"] = sum(training.pruner.widths.values())
    return {**metrics, "seconds": seconds}
