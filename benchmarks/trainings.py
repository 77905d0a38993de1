"""What the studies that train students share: their options, the data, the logits that guide, and the kept results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.table import Table, write_markdown
from kddp_ext.files import write_json
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import read_dataset
from kddp_ext.workflow.folder import RunFolder, locked
from kddp_ext.workflow.jobs import Job, Stage
from kddp_ext.workflow.measure import accuracy, count_macs, count_parameters
from kddp_ext.workflow.models import build_student
from kddp_ext.workflow.runs import Run, start_training
from kddp_ext.workflow.runtime import Runtime, prepare_process
from kddp_ext.workflow.saved_models import find_model
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.train import Recipe, Training, student_recipe, train


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a finished training, or a student file")
    parser.add_argument("--folder", type=Path, required=True, help="where results are kept")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validation", type=int, default=0, help="images to choose settings by, instead of the test's")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", metavar="FILE", help="fill the tables of this page")
    return parser


class Study:
    """A trained network, the data it was trained on, and a folder of results. `arguments` are those of `study_parser`.

    A result that is in the folder is not computed again, and processes with the same folder share the work.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        prepare_process()
        self.folder: Path = arguments.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saved = find_model(arguments.source)
        self.config = dataclasses.replace(self.saved.config, validation=arguments.validation)
        self.runtime = Runtime("auto", self.config.precision)
        raw = read_dataset(self.config.dataset, arguments.data_dir)
        self.data = ImageData(raw, self.saved.info, self.config, self.runtime.device)
        self.run = Run(RunFolder(self.folder), self.data, self.runtime, Console(stderr=True))

    @cached_property
    def teacher(self) -> nn.Module:
        """The trained network, which guides students."""
        return self.runtime.place(self.saved.load())

    def student(self, stage: Stage, config: RunConfig) -> dict[str, Any]:
        """Train a fresh student; returns its figures."""
        recipe = student_recipe(config, stage)
        model = self.runtime.place(build_student(config, self.data.info))
        training = start_training(self.run, Job(stage, stage, config), model, recipe)
        return {**self.train(stage, training, recipe, self.teacher), "widths": training.history.widths}

    def train(self, name: str, training: Training, recipe: Recipe, teacher: nn.Module) -> dict[str, Any]:
        """Train under the guidance of `teacher`, if the loss has a term for it; returns the figures."""
        logits = None
        if recipe.loss.alpha > 0:
            logits = TeacherLogits(teacher, self.data, recipe.shift, self.folder / "teacher_logits", self.runtime)
            for view in range(min(recipe.views or recipe.epochs, recipe.epochs)):
                logits.view(view)  # not a part of the seconds
        started, processor = time.perf_counter(), time.process_time()

        def say(metrics: dict[str, Any]) -> None:
            print(f"{name}: {metrics}", flush=True)

        train(training, recipe, self.data, logits, self.runtime, say)
        seconds = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
        return {**self.figures(training.model), **seconds}

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """What is measured of a network; only this function looks at the test images."""
        return {
            "accuracy": accuracy(model, self.data, self.data.validation or self.data.test, self.runtime),
            "macs": count_macs(model, self.data.example()),
            "parameters": count_parameters(model),
        }

    def finish(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Make sure that there is a result of this name, unless another process is making it."""
        path, work = self.folder / f"{name}.json", self.folder / name
        work.mkdir(exist_ok=True)
        with locked(work, wait=False) as held:
            if held and not path.exists():
                result = run()
                write_json(path, result)
                print(name, result, flush=True)


def changed(config: RunConfig, change: str) -> RunConfig:
    """`config` with other settings: options and values, joined by commas, "student.width=64,distillation.alpha=0.7".

    Values other than numbers and texts are JSON: true, [8, 16].
    """
    for setting in filter(None, re.split(r",(?![^[]*])", change)):  # not within a list
        option, value = setting.split("=")
        section, _, field = option.rpartition(".")
        part = getattr(config, section) if section else config
        old = getattr(part, field)
        plain = isinstance(old, int | float | str) and not isinstance(old, bool)
        new = type(old)(value if plain else json.loads(value))
        part = dataclasses.replace(part, **{field: new})
        config = dataclasses.replace(config, **{section: part}) if section else part
    return config


def over_seeds(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results whose name ends with a seed, by the rest of their name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*, seed *.json")):
        found.setdefault(path.stem.rpartition(", seed ")[0], []).append(json.loads(path.read_text()))
    return found


def show(tables: Sequence[Table], markdown: str | None) -> None:
    """Print the tables of a study, and fill their places in the Markdown file if there is one."""
    if markdown:
        write_markdown(markdown, None, tables)
    for table in tables:
        Console().print(table.for_terminal())


def mean_accuracy(results: list[dict[str, Any]]) -> str:
    """The accuracy in percent: mean ± standard deviation, or one result."""
    scores = [100 * each["accuracy"] for each in results]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.2f}{spread}"
