"""`kddp info` and `kddp evaluate`: what a finished run or a student file holds, and how accurate it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from kddp_ext.workflow.folder import RunFolder, load_checkpoint
from kddp_ext.workflow.jobs import TEACHER
from kddp_ext.workflow.measure import accuracy, count_macs, count_parameters
from kddp_ext.workflow.models import build_student, build_teacher
from kddp_ext.workflow.report import measure_points, print_results, say
from kddp_ext.workflow.runtime import Runtime


@dataclass(frozen=True)
class SavedModel:
    """A trained network on disk: its training's name, its file, its stage and settings.

    `history` is what was pruned; None for the teacher.
    """

    name: str
    path: Path
    stage: str
    config: RunConfig
    history: kddp_ext.PruningHistory | None

    def load(self, example: Tensor) -> nn.Module:
        """The network on the CPU with its weights; `example` are images (2, C, S, S) on the CPU."""
        info = INFO[self.config.dataset]
        with _named(self.path):
            if self.history is not None:
                return kddp_ext.load_student(self.path, lambda: build_student(self.config, info), (example,))
            model = build_teacher(self.config, info)
            model.load_state_dict(load_checkpoint(self.path, "teacher")["model"])
            return model


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
    teacher = SavedModel(TEACHER, folder.checkpoint(TEACHER), "teacher", sweep.run, None)
    return [teacher if name == TEACHER else _student(folder.student(name)) for name in finished]


def _student(path: Path) -> SavedModel:
    with _named(path):
        header = kddp_ext.read_student_header(path)
        metadata = header["metadata"]
        if not {"config", "stage"} <= metadata.keys():
            raise WorkflowError(f"{path} was not written by kddp run: its header has no config and stage")
        config = RunConfig.from_json(parse_json(metadata["config"], most=2**22))
        history = kddp_ext.PruningHistory.from_json(header["history"])
        return SavedModel(path.parent.name, path, metadata["stage"], config, history)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make an error about the content of a file a WorkflowError of one line that names the file."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise WorkflowError(message if str(path) in message else f"{path}: {message}") from error


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
        for line in () if saved.history is None else _pruned(saved.history):
            say(console, f"{saved.name}: {line}")
    base = preset(config.dataset, config.preset).options()
    changed = [f"  {option} = {value}" for option, value in config.options().items() if base[option] != value]
    exceptions = ", except" if changed else ""
    for line in (f"\nSettings: {config.dataset}, preset {config.preset}{exceptions}", *changed):
        say(console, line)
    say(console, f"All settings are in {path / 'config.json' if path.is_dir() else f'the header of {path}'}")


def _describe_student(saved: SavedModel, console: Console) -> None:
    info = INFO[saved.config.dataset]
    images = torch.zeros(2, info.channels, info.size, info.size)
    model = saved.load(images)
    say(console, f"{saved.path}: a student for {info.name}, trained in the stage {saved.stage}")
    size = f"{saved.path.stat().st_size / 1024:,.0f} KiB"
    macs = count_macs(model, images[:1])
    say(console, f"{count_parameters(model):,} parameters, {macs:,} multiply-adds for one image, {size}\n")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            say(console, f"  {name:<16} {str(module).replace(', bias=False', '')}")
    say(console, "")


def _pruned(history: kddp_ext.PruningHistory) -> Iterator[str]:
    """What was pruned, a line for each layer."""
    for layer, width in history.original_widths.items():
        removed = [str(len(step[layer])) for step in history.steps if step.get(layer)]
        steps = f"; removed {', '.join(removed)}" if removed else ""
        yield f"{layer}: {width:,} neurons at the start, {history.widths[layer]:,} now{steps}"
