"""`kddp info` and `kddp evaluate`: what a finished run or a student file holds, and how accurate it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import kddp_ext
from kddp_ext.files import parse_json
from kddp_ext.workflow.config import Device, RunConfig, preset
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder, check_architecture, load_checkpoint
from kddp_ext.workflow.jobs import TEACHER
from kddp_ext.workflow.measure import accuracy, count_macs, count_parameters
from kddp_ext.workflow.models import build_student, build_teacher
from kddp_ext.workflow.report import measure_points, print_results, say
from kddp_ext.workflow.runtime import Runtime


@dataclass(frozen=True)
class SavedModel:
    """A trained network on disk: its training's name, its file, its stage and settings.

    `history` is what was pruned; None for the teacher. `load` builds the network on the CPU and loads its weights,
    given example images (2, C, S, S) on the CPU.
    """

    name: str
    path: Path
    stage: str
    config: RunConfig
    history: kddp_ext.PruningHistory | None
    load: Callable[[Tensor], nn.Module]


def find_models(path: Path) -> list[SavedModel]:
    """The finished networks in `path`, a run's folder or a student file; raises WorkflowError if it is neither."""
    if not path.exists():
        raise WorkflowError(f"{path}: no such file or folder")
    if path.is_file():
        return [_student(path)]
    folder = RunFolder(path)
    sweep = folder.read_config()
    jobs = {job.name: job for point in folder.points(sweep) for job in point.jobs}
    finished = [name for name in jobs if folder.read_result(name) is not None]
    if not finished:
        raise WorkflowError(f"{path}: no training of this run is finished yet. Continue it with --resume.")
    return [_teacher(folder, sweep.run) if name == TEACHER else _student(folder.student(name)) for name in finished]


def evaluate(path: Path, data_dir: Path | None, device: Device, console: Console) -> None:
    """Print the test accuracy of each finished network in `path`."""
    models = find_models(path)
    config = models[0].config
    runtime = Runtime(device, config.precision)
    data = ImageData(read_dataset(config.dataset, data_dir), INFO[config.dataset], config, runtime.device)
    for saved in models:
        model = runtime.place(saved.load(data.example(2).cpu()))
        correct = accuracy(model, data, data.test, runtime)
        say(console, f"{saved.name:<8} {correct:.2%} of {len(data.test):,} test images  ({saved.path})")


def describe(path: Path, console: Console) -> None:
    """Print one page about a run or a student file: the figures first, the settings last."""
    models = find_models(path)
    config = models[0].config
    if path.is_dir():
        folder = RunFolder(path)
        sweep = folder.read_config()
        print_results(console, sweep, measure_points(folder, folder.points(sweep)))
    else:
        _describe_student(models[0], console)
    for saved in models:
        for layer, steps in _pruned(saved).items():
            say(console, f"{saved.name}: {layer}: {steps}")
    base = preset(config.dataset, config.preset).options()
    changed = [f"{option} = {value}" for option, value in config.options().items() if base[option] != value]
    title = f"\nSettings: {config.dataset}, preset {config.preset}" + (", except" if changed else "")
    for line in [title, *(f"  {line}" for line in changed)]:
        say(console, line)
    say(console, f"All settings are in {path / 'config.json' if path.is_dir() else 'the header of ' + str(path)}")


def _describe_student(saved: SavedModel, console: Console) -> None:
    info = INFO[saved.config.dataset]
    images = torch.zeros(2, info.channels, info.size, info.size)
    model = saved.load(images)
    modules = [each for each in model.named_modules() if isinstance(each[1], nn.Conv2d | nn.Linear)]
    for line in (
        f"{saved.path}: a student for {info.name}, trained in the stage {saved.stage}",
        f"{count_parameters(model):,} parameters, {count_macs(model, images[:1]):,} multiply-adds for one image, "
        f"{saved.path.stat().st_size / 1024:,.0f} KiB\n",
        *(f"  {name:<16} {str(module).replace(', bias=False', '')}" for name, module in modules),
        "",
    ):
        say(console, line)


def _pruned(saved: SavedModel) -> dict[str, str]:
    """What was pruned, by layer."""
    if saved.history is None:
        return {}
    found = {}
    for layer, width in saved.history.original_widths.items():
        removed = [str(len(step[layer])) for step in saved.history.steps if step.get(layer)]
        steps = f"; removed {', '.join(removed)}" if removed else ""
        found[layer] = f"{width:,} neurons at the start, {saved.history.widths[layer]:,} now{steps}"
    return found


def _teacher(folder: RunFolder, config: RunConfig) -> SavedModel:
    path = folder.checkpoint(TEACHER)

    def load(_example: Tensor) -> nn.Module:
        state = load_checkpoint(path, "teacher")
        model = build_teacher(config, INFO[config.dataset])
        check_architecture(path, state["architecture"], model)
        model.load_state_dict(state["model"])
        return model

    return SavedModel(TEACHER, path, "teacher", config, None, load)


def _student(path: Path) -> SavedModel:
    try:
        header = kddp_ext.read_student_header(path)
        metadata = header["metadata"]
        if not {"config", "stage"} <= metadata.keys():
            raise WorkflowError(f"{path} was not written by kddp run: its header has no config and stage")
        config = RunConfig.from_json(parse_json(metadata["config"], most=2**22))
        history = kddp_ext.PruningHistory.from_json(header["history"])
    except ValueError as error:
        raise WorkflowError(str(error)) from error

    def load(example: Tensor) -> nn.Module:
        try:
            return kddp_ext.load_student(path, lambda: build_student(config, INFO[config.dataset]), (example,))
        except ValueError as error:
            raise WorkflowError(str(error)) from error

    return SavedModel(path.parent.name, path, metadata["stage"], config, history, load)
