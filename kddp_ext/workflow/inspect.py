"""What a saved run or student file is, and how well it does: `kddp info` and `kddp evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import kddp_ext
from kddp_ext.files import parse_json
from kddp_ext.workflow.checkpoint import check_architecture, load_checkpoint
from kddp_ext.workflow.config import RunConfig, load_config
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder, require_run
from kddp_ext.workflow.job import STAGES, Stage
from kddp_ext.workflow.measure import accuracy, count_parameters
from kddp_ext.workflow.models import build_student, build_teacher
from kddp_ext.workflow.report import print_table
from kddp_ext.workflow.runtime import Device, Runtime


@dataclass(frozen=True)
class SavedModel:
    """A trained network on disk.

    Attributes:
        path: its file.
        stage: that trained it.
        config: of the run that trained it.
        history: what was pruned; None for the teacher.
        load: builds it on the CPU and loads its weights, given example images (2, C, S, S) there.
    """

    path: Path
    stage: str
    config: RunConfig
    history: kddp_ext.PruningHistory | None
    load: Callable[[Tensor], nn.Module]


def find_models(path: Path) -> list[SavedModel]:
    """The finished networks in `path`, a run's folder or a student file.

    Raises:
        WorkflowError: `path` is neither, or a file in it is damaged.
    """
    if not path.exists():
        raise WorkflowError(f"{path}: no such file or folder")
    if path.is_file():
        return [_student(path)]
    folder = require_run(path)
    finished = [stage for stage in STAGES if folder.read_result(stage) is not None]
    if not finished:
        raise WorkflowError(f"{path}: no stage of this run is finished yet. Continue it with kddp run --resume.")
    return [_teacher(folder) if stage == "teacher" else _student_of(folder, stage) for stage in finished]


def evaluate(path: Path, data_dir: Path | None, device: Device, console: Console) -> None:
    """Print the test accuracy of each finished network in `path`."""
    models = find_models(path)
    config = models[0].config
    runtime = Runtime(device, config.precision)
    raw, info = read_dataset(config.dataset, data_dir), INFO[config.dataset]
    data = ImageData(raw, info, config, runtime.device)
    for saved in models:
        model = runtime.place(saved.load(data.example(2).cpu()))
        correct = accuracy(model, data, data.test, runtime)
        console.print(
            f"{saved.stage:<8} {correct:.2%} of {len(data.test):,} test images  ({saved.path})",
            highlight=False,
            soft_wrap=True,
        )


def describe(path: Path, console: Console) -> None:
    """Print the table of a run, and the architecture of each network and what was pruned of it."""
    models = find_models(path)
    config = models[0].config
    info = INFO[config.dataset]
    example = torch.zeros(2, info.channels, info.size, info.size)
    if path.is_dir():
        print_table(console, RunFolder(path), f"KDDP on {info.name}", {})
    for saved in models:
        model = saved.load(example)
        console.print(
            f"\n[bold]{saved.stage}[/bold]: {count_parameters(model):,} parameters, {saved.path}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(str(model), highlight=False, soft_wrap=True, markup=False)
        for line in _pruned(saved.history):
            console.print(line, highlight=False, soft_wrap=True)
    console.print("\n[bold]settings[/bold]")
    for option, value in config.options().items():
        console.print(f"{option} = {value}", highlight=False, soft_wrap=True, markup=False)


def _pruned(history: kddp_ext.PruningHistory | None) -> list[str]:
    if history is None:
        return []
    return [
        f"{layer}: {width} neurons at the start, {history.widths[layer]} now; removed "
        + (", ".join(str(len(step.get(layer, []))) for step in history.steps) or "none")
        for layer, width in history.original_widths.items()
    ]


def _teacher(folder: RunFolder) -> SavedModel:
    config = load_config(folder.config)
    path = folder.checkpoint("teacher")

    def load(_example: Tensor) -> nn.Module:
        state = load_checkpoint(path, "teacher")
        model = build_teacher(config, INFO[config.dataset])
        check_architecture(path, state["architecture"], model)
        model.load_state_dict(state["model"])
        return model

    return SavedModel(path, "teacher", config, None, load)


def _student_of(folder: RunFolder, stage: Stage) -> SavedModel:
    saved = _student(folder.student(stage))
    if saved.stage != stage:
        advice = f"Delete {folder.result(stage)} and resume, and it is written anew from the checkpoint."
        raise WorkflowError(f"{saved.path} is a student of the stage {saved.stage}. {advice}")
    return saved


def _student(path: Path) -> SavedModel:
    try:
        header = kddp_ext.read_student_header(path)
        metadata = header["metadata"]
        if not {"config", "stage"} <= metadata.keys():
            raise WorkflowError(f"{path} was not written by kddp run: its header names no config and stage")
        config = RunConfig.from_json(parse_json(metadata["config"], most=2**22))
        history = kddp_ext.PruningHistory.from_json(header["history"])
    except WorkflowError:
        raise
    except ValueError as error:
        raise WorkflowError(str(error)) from error

    def load(example: Tensor) -> nn.Module:
        try:
            return kddp_ext.load_student(path, lambda: build_student(config, INFO[config.dataset]), (example,))
        except ValueError as error:
            raise WorkflowError(str(error)) from error

    return SavedModel(path, metadata["stage"], config, history, load)
