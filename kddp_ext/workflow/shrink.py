"""`kddp shrink`: makes a trained network smaller while it is distilled from what it was.

The network itself is the teacher, and a copy is the student. Neurons of all layers are removed by saliency, in small
steps over the first part of the training; the rest of it trains what is left. A copy has nothing to learn from its
teacher at first, so saliency is measured by `fisher_loss` on some batches before each check.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import kddp_ext
from kddp_ext.files import parse_json, write_json, write_text
from kddp_ext.workflow import distributed
from kddp_ext.workflow.config import Device, PruningConfig, RunConfig, ShrinkConfig, StudentConfig, differences
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.distributed import on_rank_zero
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder, locked
from kddp_ext.workflow.html_report import curves_of_epochs, write_page
from kddp_ext.workflow.inspect import data_of
from kddp_ext.workflow.jobs import Job
from kddp_ext.workflow.measure import (
    Confusion,
    confusion,
    count_macs,
    count_parameters,
    latencies,
    nonzero_counts,
    share_correct,
)
from kddp_ext.workflow.plots import save_picture
from kddp_ext.workflow.report import Table, class_table, say
from kddp_ext.workflow.runs import Run, claimed, make_pruner, save_student, train_job
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.saved_models import SavedModel, find_model
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.train import measure_saliency, student_recipe

_STUDENT = "student"  # the name of the training, and of its folder
_CALIBRATION_BATCH = 250
_CALIBRATION_BATCHES = 8  # at least: so many fill the samples of the reconstruction
_CALIBRATION_PRUNES = 8  # each with what the prunes before it left
PROBES = 4  # batches: the first of them measures only means
_NORM_MOMENTUM = 0.1  # PyTorch's default
_FEWEST_CHECKS = 4  # so that one of them does not remove everything


class _Schedule(NamedTuple):
    """When neurons are removed, by default."""

    checks: int  # in each pass
    fewest_steps: int  # between two checks
    until: float  # share of the training


_TO_A_TARGET = _Schedule(checks=40, fewest_steps=1, until=0.05)
# Each check waits until the loss has fallen, which the steps between them show.
_WITH_BUDGET = _Schedule(checks=8, fewest_steps=4, until=0.25)


def settings_of(shrink: ShrinkConfig, saved: SavedModel, images: int) -> RunConfig:
    """The settings of the training, for a data set with this many training images."""
    source = saved.config
    batch_size = shrink.batch_size or source.student.batch_size
    network: Any = source.teacher if saved.stage == "teacher" else source.student
    keeps_a_budget = bool(shrink.loss_budget) or not (shrink.target_macs or shrink.target_parameters)
    schedule = _WITH_BUDGET if keeps_a_budget else _TO_A_TARGET
    student = StudentConfig(
        architecture=network.architecture,
        channels=network.channels,
        width=source.student.width,
        network=":".join(network.network.split(":")[:2]),  # without weights
        epochs=shrink.epochs,
        shift=shrink.shift,
        batch_size=batch_size,
        learning_rate=shrink.learning_rate,
        muon_learning_rate=0.0 if keeps_a_budget else shrink.muon_learning_rate,
    )
    steps = max(1, images // batch_size)  # of a pass
    interval = max(schedule.fewest_steps, steps // (shrink.checks or schedule.checks))
    few = min(1.0, _FEWEST_CHECKS * interval / (shrink.epochs * steps))  # where there are few images
    pruning = PruningConfig(
        l1_weight=0.0,
        layers="all",
        steps=interval,
        until=shrink.until or max(schedule.until, few),
        criterion="saliency",
        target_macs=shrink.target_macs,
        target_parameters=shrink.target_parameters,
        loss_budget=shrink.loss_budget,
        round_to=shrink.round_to,
        reconstruction_samples=shrink.reconstruction_samples,
    )
    distillation = dataclasses.replace(source.distillation, temperature=shrink.temperature, alpha=shrink.alpha)
    return dataclasses.replace(source, seed=shrink.seed, student=student, pruning=pruning, distillation=distillation)


def run_shrink(
    source: Path,
    path: Path,
    config: ShrinkConfig,
    console: Console,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    own: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Shrink the network in `source` in the folder `path`, then write and print the report.

    `own` is as for `SavedModel.load`.

    Raises:
        WorkflowError: a setting or a file cannot be used; the message says which.
        OSError: the folder cannot be written to.
    """
    if distributed.rank() > 0:
        console = Console(quiet=True, force_terminal=False)
    saved = find_model(source)
    runtime, folder = Runtime(device, saved.config.precision), RunFolder(path)
    data = data_of(saved, source.parent if source.is_dir() else source, data_dir, runtime, console)
    on_rank_zero(lambda: _open(folder, config, saved, resume=resume))
    run_config = settings_of(config, saved, len(data.train))
    run = Run(folder, data, runtime, console)
    original = runtime.place(saved.load(own)).eval()
    student = runtime.place(saved.load(own))
    say(console, f"{saved.path}: {count_macs(original, data.example()):,} multiply-adds; {runtime}")
    started = time.monotonic()
    job = Job(_STUDENT, "kddp", run_config)
    with claimed(run, job, wait=True):
        if config.calibrate:
            history = _calibrated(student, data, config.calibrate, run_config, saved, runtime)
            on_rank_zero(lambda: save_student(run, job, student, history))
        else:
            logits = TeacherLogits(original, data, config.shift, folder.teacher_logits, runtime)
            recipe = dataclasses.replace(student_recipe(run_config, "kddp"), probes=PROBES)
            training = train_job(run, job, student, recipe, logits, saved.history, with_slow_norms)
            assert training.pruner is not None
            student, history = training.model, training.pruner.history
    seconds = time.monotonic() - started
    rows = _measured(original, student, data, runtime)
    on_rank_zero(lambda: _write(folder, config, saved, rows, history, seconds))
    say(console, f"{folder.report.read_text(encoding='utf-8')}\nThe report is {folder.report}")


def with_slow_norms(model: nn.Module) -> nn.Module:
    """`model`, whose batch normalisations average over at least some ten batches for evaluation.

    A trained network changes slowly, so older batches count, and batches may be smaller than when it was trained.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = min(module.momentum, _NORM_MOMENTUM)
    return model


def _open(folder: RunFolder, config: ShrinkConfig, saved: SavedModel, *, resume: bool) -> None:
    """Create the folder, or check that the one that is there was made by the same command."""
    settings = {"shrink": str(saved.path.resolve()), **dataclasses.asdict(config)}
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path):
        if folder.config.is_file():
            found = parse_json(folder.config.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or "shrink" not in found:
                raise WorkflowError(f"{folder.path} holds something else; give another --name")
            if not resume:
                raise WorkflowError(f"{folder.path} exists; continue it with --resume, or give another --name")
            if changed := differences(found, settings):
                raise WorkflowError(f"{folder.path} was started with other settings: {'; '.join(changed)}")
        write_json(folder.config, settings)


def _calibrated(
    model: nn.Module, data: ImageData, images: int, config: RunConfig, saved: SavedModel, runtime: Runtime
) -> kddp_ext.PruningHistory:
    """Prune `model` step by step without training; returns what was pruned from it in all.

    A loss budget refers to the cross entropy.
    """
    pruner = make_pruner(
        model, [], config.pruning, data.example(2), history=saved.history, target_steps=_CALIBRATION_PRUNES
    )
    images = min(images, len(data.train))
    indices = torch.arange(images).split(max(1, min(_CALIBRATION_BATCH, images // _CALIBRATION_BATCHES)))
    for prune in range(_CALIBRATION_PRUNES):
        batches = (
            (data.normalise(data.train.images[each]), partial(F.cross_entropy, target=data.train.labels[each]))
            for each in indices
        )
        measure_saliency(pruner, batches, config.distillation.loss(), runtime, config.seed + prune)
        model.zero_grad()
        pruner.prune()
    return pruner.history


# --- The report


@dataclass(frozen=True)
class _Figures:
    """What is measured of a network."""

    accuracy: float
    parameters: int
    macs: int
    bytes: int
    milliseconds: Mapping[str, float]  # for one batch, by what runs it and its size
    confusion: Confusion  # on the test images


def _measured(original: nn.Module, student: nn.Module, data: ImageData, runtime: Runtime) -> tuple[_Figures, _Figures]:
    """The figures before and after. Only this function looks at the test images."""
    found = []
    times = on_rank_zero(lambda: latencies([original, student], data.example(64)))  # alone, or they would wait
    for model, milliseconds in zip((original, student), times, strict=True):
        counts = confusion(model, data, data.test, runtime)
        found.append(
            _Figures(
                share_correct(counts),
                count_parameters(model),
                count_macs(model, data.example()),
                _size_on_disk(model),
                milliseconds,
                nonzero_counts(counts),
            )
        )
    return found[0], found[1]


def _size_on_disk(model: nn.Module) -> int:
    """The bytes of its tensors, which a safetensors file has besides its header."""
    return sum(each.numel() * each.element_size() for each in model.state_dict().values())


def _write(
    folder: RunFolder,
    config: ShrinkConfig,
    saved: SavedModel,
    figures: tuple[_Figures, _Figures],
    history: kddp_ext.PruningHistory,
    seconds: float,
) -> None:
    before, after = figures
    rows = [("test accuracy (%)", f"{100 * before.accuracy:.2f}", f"{100 * after.accuracy:.2f}",
             f"{100 * (after.accuracy - before.accuracy):+.2f}")]  # fmt: skip
    for name, old, new in (
        ("parameters", before.parameters, after.parameters),
        ("multiply-adds of an image", before.macs, after.macs),
        ("bytes of the tensors", before.bytes, after.bytes),
    ):
        rows.append((name, f"{old:,}", f"{new:,}", f"{new / old:.3f}x"))
    for name, old_time in before.milliseconds.items():
        new_time = after.milliseconds[name]
        rows.append((f"{name} (ms)", f"{old_time:.2f}", f"{new_time:.2f}", f"{new_time / old_time:.2f}x"))
    table = Table("shrunk", ("", "before", "after", "change"), rows)
    widths = {layer: (width, history.widths[layer]) for layer, width in history.original_widths.items()}
    layers = Table(
        "layers", ("layer", "before", "after"), [(name, str(old), str(new)) for name, (old, new) in widths.items()]
    )
    classes = class_table(saved.info.class_names, {"before": [before.confusion], "after": [after.confusion]})
    epochs = [] if config.calibrate else folder.read_epochs(_STUDENT)
    title = f"{saved.path}, shrunk"
    how = f"{config.calibrate} images, no training" if config.calibrate else f"{config.epochs} passes"
    summary = f"{how}, {seconds:.0f} s. The student is {folder.student(_STUDENT)}."
    write_json(
        folder.result(_STUDENT),
        {
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "widths": {layer: list(each) for layer, each in widths.items()},
            "seconds": round(seconds, 1),
        },
    )
    _draw(folder.picture, widths)
    write_page(
        folder.page,
        title,
        {
            "": [summary, table],
            "Curves": curves_of_epochs({"student": epochs}) if epochs else [],
            "Neurons of each layer": [layers],
            "Accuracy of each class (%)": [classes],
        },
    )
    write_text(
        folder.report,
        f"# {title}\n\n{summary}\n\n"
        f"{table.to_markdown()}\n\n## Neurons of each layer\n\n![Neurons of each layer](report.png)\n\n"
        f"{layers.to_markdown()}\n",
    )


def _draw(path: Path, widths: Mapping[str, tuple[int, int]]) -> None:
    """Draw the widths of all layers before and after."""
    figure = Figure(figsize=(7, 1 + 0.28 * len(widths)), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = list(widths)[::-1]
    axes.barh(names, [widths[name][0] for name in names], color="#dfe3e8", label="before")
    axes.barh(names, [widths[name][1] for name in names], color="#c0354a", height=0.5, label="after")
    axes.set(title="Neurons of each layer", xlabel="neurons")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    save_picture(figure, path)
