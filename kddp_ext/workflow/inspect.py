"""`kddp info` and `kddp evaluate`: what a finished run or a student file holds, and how accurate it is."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from torch import nn

import kddp_ext
from kddp_ext.workflow.config import Device, RunConfig, for_own_networks, preset
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import DatasetInfo, RawDataset, read_dataset
from kddp_ext.workflow.errors import DataFileError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.image_folder import read_image_folder
from kddp_ext.workflow.measure import accuracy, count_macs, count_parameters
from kddp_ext.workflow.report import classes_of, input_of, measure_points, print_results, say
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.saved_models import SavedModel, find_models


def evaluate(
    path: Path, data_dir: Path | None, device: Device, console: Console, own: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Print the test accuracy of each finished network in `path`; `own` is as for `SavedModel.load`."""
    models = find_models(path)
    runtime = Runtime(device, models[0].config.precision)
    data = data_of(models[0], path, data_dir, runtime, console)
    for saved in models:
        model = runtime.place(saved.load(own))
        correct = accuracy(model, data, data.test, runtime)
        say(console, f"{saved.name:<8} {correct:.2%} of {len(data.test):,} test images  ({saved.path})")
    say(console, classes_of(data.info))


def data_of(saved: SavedModel, path: Path, data_dir: Path | None, runtime: Runtime, console: Console) -> ImageData:
    """The data set that the networks in `path`, among them `saved`, were trained for; it may be in `data_dir` now."""
    config = saved.config
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=str(data_dir))
    return ImageData(_read_images(path, config, saved.info, console), saved.info, config, runtime.device)


def _read_images(path: Path, config: RunConfig, info: DatasetInfo, console: Console) -> RawDataset:
    if config.dataset != "folder":
        return read_dataset(config.dataset, config.data_path)
    if path.is_file():  # the new images may be other ones
        config = dataclasses.replace(config, channels=1 if info.channels == 1 else 3)
    with tempfile.TemporaryDirectory() as temporary:  # a file that is mapped may be removed
        cache = RunFolder(path).images if path.is_dir() else Path(temporary)
        raw, found = read_image_folder(config, cache, console)
    if found.class_names != info.class_names:
        raise DataFileError(config.data_dir, classes_of(info), classes_of(found))
    return raw


def describe(path: Path, console: Console) -> None:
    """Print one page about a run or a student file: the figures first, the settings last."""
    models = find_models(path)
    config = models[0].config
    if path.is_dir():
        folder = RunFolder(path)
        sweep = folder.read_config()
        print_results(console, models[0].info, measure_points(folder, folder.points(sweep)))
    else:
        _describe_student(models[0], console)
    for saved in models:
        for line in () if saved.history is None else _pruned(saved.history):
            say(console, f"{saved.name}: {line}")
    base = for_own_networks(
        preset(config.dataset, config.preset, config.size), config.teacher.network, config.student.network
    ).options()
    changed = [f"  {option} = {value}" for option, value in config.options().items() if base[option] != value]
    exceptions = ", except" if changed else ""
    for line in (f"\nSettings: {config.dataset}, preset {config.preset}{exceptions}", *changed):
        say(console, line)
    say(console, f"All settings are in {path / 'config.json' if path.is_dir() else f'the header of {path}'}")


def _describe_student(saved: SavedModel, console: Console) -> None:
    info = saved.info
    say(console, f"{saved.path}: a student for {info.name}, trained in the stage {saved.stage}")
    say(console, classes_of(info))
    say(console, f"Input: {input_of(info)}")
    if saved.config.student.network:
        say(console, f"It was trained from --student {saved.config.student.network}. Its tensors:\n")
        for name, (dtype, shape) in kddp_ext.read_student_header(saved.path)["tensors"].items():
            say(console, f"  {name:<32} {dtype} {shape}")
        say(console, "")
        return
    model = saved.load()
    size = f"{saved.path.stat().st_size / 1024:,.0f} KiB"
    macs = count_macs(model, torch.zeros(1, info.channels, info.size, info.size))
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
