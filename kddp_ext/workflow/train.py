"""The training loop. All four stages use it; a recipe says how they differ."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kddp_ext
from kddp_ext.workflow import distributed
from kddp_ext.workflow.config import PruningConfig, RunConfig, StudentConfig, TeacherConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.jobs import Stage
from kddp_ext.workflow.measure import accuracy, count_parameters
from kddp_ext.workflow.models import FastTeacher
from kddp_ext.workflow.muon import Muon
from kddp_ext.workflow.networks import logits_of
from kddp_ext.workflow.runtime import PhaseClock, Runtime
from kddp_ext.workflow.teacher_logits import TeacherLogits

_TEACHER_MUON_MOMENTUM = 0.6  # Jordan's value for this family of networks and batches of 2000
_STUDENT_MUON_MOMENTUM = 0.9
_TERMS = ("loss", "kd", "cross_entropy", "l1", "correct")


@dataclass(frozen=True)
class Recipe:
    """How one stage trains.

    Attributes:
        seed: seed of the order of the images.
        batch_size: images per step, summed over all processes.
        learning_rate: the learning rate by position in the training, from 0 (start) to 1 (end).
        loss: settings of the loss. An alpha of 0 trains without the teacher; l1_weight is the highest weight.
        frozen_from: epoch, counted from 0, from which a parameter is no longer trained, by the parameter's name.
        shift: largest shift of augmented images in pixels.
        views: number of views of the images that the epochs cycle through; 0 draws a new view in each.
        pruning: when the penalty acts and when the pruner checks. After `until` no activations are read.
        probes: number of batches that show the pruner the model before each check, in evaluation mode and by
            `kddp_ext.fisher_loss`; the training steps then do not. 0: the training steps do. It needs `pruning.steps`.
        patience: the training ends after this many epochs without a better validation accuracy; 0: never.
    """

    stage: Stage
    seed: int
    epochs: int
    batch_size: int
    learning_rate: Callable[[float], float]
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]
    loss: kddp_ext.LossSettings
    frozen_from: Mapping[str, int] = field(default_factory=dict)
    shift: int = 0
    views: int = 0
    pruning: PruningConfig = field(default_factory=PruningConfig)
    probes: int = 0
    patience: int = 0

    def checks(self, steps: int) -> int:
        """The number of prunes, where an epoch has this many steps."""
        if every := self.pruning.steps:
            last = int(self.pruning.until * self.epochs * steps) // every
            return last - max(0, -(-self.first_step(steps) // every) - 1)
        return sum(self.prunes_after(epoch) for epoch in range(self.epochs))

    def first_step(self, steps: int) -> int:
        """The number of the step, counted from 1, from which on a step may prune, where an epoch has `steps`."""
        return int(self.pruning.start * self.epochs * steps)

    def prunes_after(self, epoch: int) -> bool:
        """Whether the end of this epoch is a check."""
        is_last = epoch + 1 == self.epochs
        if self.pruning.when == "at-the-end":
            return is_last
        # 'every-epoch' skips the last epoch, because nothing trains after it.
        return not is_last and self.pruning.start * self.epochs < epoch + 1 <= self.pruning.until * self.epochs

    def l1_weight_at(self, position: float) -> float:
        """The penalty's weight by position in the training, from 0 (start) to 1 (end)."""
        if position >= self.pruning.l1_until:
            return 0.0
        warmup = self.pruning.l1_warmup
        return float(self.loss.scalars(1)[-1]) * min(1.0, position * self.epochs / warmup if warmup else 1.0)

    def view(self, epoch: int) -> int:
        """Number of the view that `epoch` trains on."""
        return epoch % self.views if self.views else epoch


@dataclass
class Training:
    """A model in training, and the metrics of each finished epoch: everything that a checkpoint holds.

    `network` is what a step calls: the model, or the wrapper that compiles or distributes it. `pruner` is closed once
    nothing is pruned any more.
    """

    model: nn.Module
    network: Callable[[Tensor], Any]
    optimizers: list[torch.optim.Optimizer]
    pruner: kddp_ext.DynamicPruner | None
    epochs: list[dict[str, Any]]
    compiled: bool = False
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the latest check

    @property
    def history(self) -> kddp_ext.PruningHistory:
        """What was pruned from the model."""
        return kddp_ext.PruningHistory({}) if self.pruner is None else self.pruner.history


def teacher_recipe(config: RunConfig) -> Recipe:
    """SGD or Adam with a triangular learning rate, or Muon with a linearly decaying one."""
    teacher = config.teacher
    schedule = (lambda position: 1 - position) if teacher.optimizer == "muon" else triangle
    return Recipe(
        stage="teacher",
        seed=teacher.seed,
        epochs=0 if teacher.has_weights else teacher.epochs,
        batch_size=teacher.batch_size,
        learning_rate=lambda position: teacher.learning_rate * schedule(position),
        optimizers=lambda model: _teacher_optimizers(model, teacher),
        loss=kddp_ext.LossSettings(alpha=0.0, label_smoothing=teacher.label_smoothing),
        frozen_from=FastTeacher.frozen_from if teacher.architecture == "fast" and not teacher.network else {},
        shift=teacher.shift,
    )


def _teacher_optimizers(model: nn.Module, teacher: TeacherConfig) -> list[torch.optim.Optimizer]:
    muon, others = _split(model, teacher.learning_rate if teacher.optimizer == "muon" else 0.0, _TEACHER_MUON_MOMENTUM)
    factors: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in others:
        if name.endswith("bias"):
            factors[teacher.bias_learning_rate].append(parameter)
        else:
            factors[teacher.classifier_learning_rate if name.startswith("classifier") else 1.0].append(parameter)
    groups = [  # the decay of a step does not depend on the group's factor
        {"params": parameters, "scale": scale, "weight_decay": teacher.weight_decay / scale}
        for scale, parameters in factors.items()
    ]
    rate, momentum = teacher.learning_rate, teacher.momentum
    if teacher.optimizer == "adam":
        return [torch.optim.Adam(groups, lr=rate, betas=(momentum, 0.999), fused=True)]
    return [*muon, torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)]


def _student_optimizers(model: nn.Module, student: StudentConfig) -> list[torch.optim.Optimizer]:
    muon, others = _split(model, student.muon_learning_rate, _STUDENT_MUON_MOMENTUM)
    for optimizer in muon:
        optimizer.param_groups[0]["scale"] = student.muon_learning_rate / student.learning_rate
    parameters, decay = [parameter for _, parameter in others], student.weight_decay
    return [*muon, torch.optim.Adam(parameters, lr=student.learning_rate, weight_decay=decay, fused=True)]


def _split(
    model: nn.Module, muon_learning_rate: float, momentum: float
) -> tuple[list[torch.optim.Optimizer], list[tuple[str, nn.Parameter]]]:
    """Muon for the filters of `model`, unless its learning rate is 0 or all are filters, and all other parameters."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Not depthwise ones: their channels are independent, and orthogonal steps would mix them.
    filters = {name: parameter for name, parameter in trained if parameter.ndim == 4 and parameter.shape[1] > 1}
    if not muon_learning_rate or not 0 < len(filters) < len(trained):  # an optimizer needs parameters
        return [], trained
    others = [(name, parameter) for name, parameter in trained if name not in filters]
    return [Muon(filters.values(), lr=muon_learning_rate, momentum=momentum)], others


def student_recipe(config: RunConfig, stage: Stage) -> Recipe:
    """Adam and perhaps Muon, with a cosine schedule. The students' recipes differ only in the terms of the loss."""
    student, pruning = config.student, config.pruning
    return Recipe(
        stage=stage,
        seed=config.seed,
        epochs=student.epochs,
        batch_size=student.batch_size,
        learning_rate=lambda position: student.learning_rate * (1 + math.cos(math.pi * position)) / 2,
        optimizers=lambda model: _student_optimizers(model, student),
        loss=config.distillation.loss(
            alpha=0.0 if stage == "scratch" else config.distillation.alpha,
            l1_weight=pruning.l1_weight if stage == "kddp" else 0.0,
        ),
        shift=student.shift,
        views=student.views,
        pruning=pruning,
        patience=student.patience,
    )


def triangle(position: float, peak: float = 0.23, start: float = 0.2) -> float:
    """Rises linearly from `start` to 1 at `peak`, then falls linearly to 0 at 1."""
    if position < peak:
        return start + (1 - start) * position / peak
    return (1 - position) / (1 - peak)


def train(
    training: Training,
    recipe: Recipe,
    data: ImageData,
    teacher: TeacherLogits | None,
    runtime: Runtime,
    epoch_done: Callable[[dict[str, Any]], None],
) -> None:
    """Train until `recipe.epochs` epochs are done or patience ends, after the last finished epoch of `training`.

    Without `teacher` it trains on the labels alone. `epoch_done` is called with the metrics of each epoch, when
    `training` can be saved. Raises WorkflowError if the loss is not finite.
    """
    for epoch in range(len(training.epochs), recipe.epochs):
        if recipe.patience and epoch - best_epoch(training.epochs) >= recipe.patience:
            return
        for name, start in recipe.frozen_from.items():
            training.model.get_parameter(name).requires_grad_(epoch < start)
        metrics = train_epoch(training, recipe, data, teacher, runtime, epoch)
        training.epochs.append(metrics)
        epoch_done(metrics)


def best_epoch(epochs: Sequence[Mapping[str, Any]]) -> int:
    """The number of the epoch with the best validation accuracy, counted from 1: the first of equals; 0 before any."""
    accuracies = [epoch["validation_accuracy"] for epoch in epochs]
    return accuracies.index(max(accuracies)) + 1 if accuracies else 0


def train_epoch(
    training: Training,
    recipe: Recipe,
    data: ImageData,
    teacher: TeacherLogits | None,
    runtime: Runtime,
    epoch: int,
) -> dict[str, Any]:
    """Make one pass over the training images, then prune. Returns the epoch's metrics; raises as `train` does."""
    clock = PhaseClock(runtime.device)
    started = time.perf_counter()
    view = recipe.view(epoch)
    with clock.phase("teacher"):
        teacher_logits = None if teacher is None else teacher.view(view)

    training.losses.clear()  # a resumed training has none, either
    training.model.train()
    batches = [distributed.share(batch) for batch in data.batches(epoch, recipe.batch_size, recipe.seed)]
    totals = torch.zeros(len(_TERMS), dtype=torch.float64, device=runtime.device)
    report = None
    for step, indices in enumerate(batches):
        position = (epoch + step / len(batches)) / recipe.epochs
        if training.pruner is not None and position >= recipe.pruning.until:
            training.pruner.close()  # from here on no activations are read
        with clock.phase("data"):
            images, labels = data.training_images(indices, view, recipe.shift), data.train.labels[indices]
            targets = None if teacher_logits is None else teacher_logits[indices]
        totals += _train_step(training, recipe, runtime, clock, position, images, labels, targets)
        if recipe.pruning.steps:
            number = epoch * len(batches) + step + 1
            if recipe.probes and number % recipe.pruning.steps == 0:
                shown = [batches[(step + k) % len(batches)] for k in range(recipe.probes)]
                _show(training, recipe, runtime, (data.training_images(e, view, recipe.shift) for e in shown), number)
            report = _prune(training, clock, lambda pruner: pruner.step()) or report

    distributed.average_buffers(training.model)
    # The epoch's only transfer to the host: until here the sums stay on the device.
    totals = distributed.total(totals) / distributed.count()
    means = dict(zip(_TERMS, (totals / len(batches)).tolist(), strict=True))
    if not math.isfinite(means["loss"]):
        raise WorkflowError(
            f"{recipe.stage}: the training diverged: the loss is {means['loss']} after epoch {epoch + 1}. "
            "Try a smaller learning rate."
        )
    if not recipe.pruning.steps:
        report = _prune(training, clock, lambda pruner: _check_after(pruner, recipe, epoch))
    with clock.phase("validation"):
        validation = accuracy(training.model, data, data.validation, runtime) if len(data.validation) else None
    metrics: dict[str, Any] = {
        "epoch": epoch + 1,
        **{term: means[term] for term in _TERMS[:-1]},
        "train_accuracy": means["correct"] / len(batches[0]),
        "validation_accuracy": validation,
        "parameters": count_parameters(training.model),
    }
    if training.pruner is not None:
        metrics["widths"] = training.pruner.widths
        metrics["width"] = sum(metrics["widths"].values())
        if report is not None and report.collapsed:
            metrics["collapsed"] = list(report.collapsed)
    return {**metrics, "seconds": {"epoch": round(time.perf_counter() - started, 4), **clock.seconds()}}


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
    """Make one step of the optimizer; returns the values of `_TERMS` on the device, without waiting for it."""
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(position) * group.get("scale", 1.0)
    with clock.phase("student"), runtime.autocast():
        logits = logits_of(training.network(images))
    with clock.phase("loss"):
        loss, terms = kddp_ext.fused_kd_l1_loss(
            logits,
            teacher_logits,
            labels,
            () if training.pruner is None or training.pruner.closed or recipe.probes else training.pruner.activations,
            return_terms=True,
            **{**vars(recipe.loss), "l1_weight": recipe.l1_weight_at(position)},
        )
    with clock.phase("student"):
        training.model.zero_grad()
        loss.backward()
        for optimizer in training.optimizers:
            optimizer.step()
    if recipe.probes:
        training.losses.append(loss.detach())
    return torch.stack([loss.detach(), terms.kd, terms.ce, terms.l1, terms.correct])


def compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    """`model` through torch.compile, for its current shapes.

    The compiler's cache is cleared first. So a resumed run uses the same kernels as an uninterrupted one, and many
    prunes do not reach torch's limit of recompilations, after which it would run the model without compiling it.
    """
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


def _show(training: Training, recipe: Recipe, runtime: Runtime, batches: Iterable[Tensor], seed: int) -> None:
    """Show the pruner the model, for a check."""
    if training.pruner is None or training.pruner.closed:
        return
    loss = torch.stack(training.losses).mean()
    training.losses.clear()
    training.pruner.reset()  # the training steps' activations were not read
    batches_and_losses = ((images, lambda _: loss) for images in batches)
    measure_saliency(training.pruner, batches_and_losses, recipe.loss, runtime, seed)
    training.model.zero_grad()
    training.model.train()


def measure_saliency(
    pruner: kddp_ext.DynamicPruner,
    batches: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]],
    settings: kddp_ext.LossSettings,
    runtime: Runtime,
    seed: int,
) -> None:
    """Show the pruner its model in evaluation mode: activations, and what their change would do to the outputs.

    It leaves gradients of no use in the parameters.

    Args:
        batches: normalised images, and what gives the mean loss of a sample from their logits.
        settings: its temperature and alpha are those of `kddp_ext.fisher_loss`.
    """
    generator = torch.Generator(runtime.device).manual_seed(seed)
    temperature, alpha = float(settings.temperature), float(settings.alpha)
    pruner.model.eval()
    for images, mean_loss in batches:
        with runtime.autocast():
            logits = logits_of(pruner.model(images)).float()
        probe = kddp_ext.fisher_loss(logits, temperature=temperature, alpha=alpha, generator=generator)
        pruner.activations.observe(probe, mean_loss(logits))
        probe.backward()


def _prune(
    training: Training, clock: PhaseClock, check: Callable[[kddp_ext.DynamicPruner], kddp_ext.PruneReport | None]
) -> kddp_ext.PruneReport | None:
    """Let the open pruner, if there is one, make a `check`."""
    if training.pruner is None or training.pruner.closed:
        return None
    with clock.phase("prune"):
        try:
            report = check(training.pruner)
        except ValueError as error:  # activations, gradients or weights are not finite
            raise WorkflowError(f"the training diverged, so it cannot be pruned: {error}") from error
    if report is not None and report.neurons_pruned and training.compiled:
        training.network = compiled(training.model)
    return report


def _check_after(pruner: kddp_ext.DynamicPruner, recipe: Recipe, epoch: int) -> kddp_ext.PruneReport | None:
    """Prune, if the end of this epoch is a check."""
    if recipe.prunes_after(epoch):
        return pruner.prune()
    pruner.reset()  # a check uses only the statistics of the epoch before it
    return None
