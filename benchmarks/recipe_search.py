"""Trains students with other settings and prints their validation accuracy. It never uses the test images.

python -m benchmarks.recipe_search --run DIR --data-dir DIR [--stage kd] [--json FILE] CHANGE [CHANGE ...]

DIR is the folder of a `kddp run` whose teacher is finished. Each CHANGE is one training: options and values, joined by
commas, such as "student.learning_rate=0.002,distillation.alpha=0.7". Results that FILE has already are not trained
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kddp_ext.files import write_json
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import Job
from kddp_ext.workflow.models import build_student
from kddp_ext.workflow.runs import Run, start_training, train_teacher
from kddp_ext.workflow.runtime import Runtime, prepare_process
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.train import student_recipe, train


def main() -> int:
    arguments = _parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    prepare_process()
    folder = RunFolder(arguments.run)
    config = folder.read_config().run
    if not config.validation:
        raise SystemExit(f"{arguments.run} has no validation split")
    runtime = Runtime("cpu", config.precision)
    data = ImageData(read_dataset(config.dataset, arguments.data_dir), INFO[config.dataset], config, runtime.device)
    run = Run(folder, data, runtime, Console(stderr=True))
    teacher = train_teacher(run, Job("teacher", "teacher", config))
    logits = TeacherLogits(teacher, data, config.student.shift, folder.teacher_logits, runtime)
    for change in arguments.changes:
        known = _read(arguments.json)
        name = f"{arguments.stage} {change}"
        if name not in known:
            metrics = _train(run, changed(config, change), arguments.stage, logits)
            write_json(arguments.json, {**_read(arguments.json), name: metrics})
        metrics = _read(arguments.json)[name]
        print(f"{100 * metrics['validation_accuracy']:.2f} width {metrics.get('width', '')} {name}", flush=True)
    return 0


def changed(config: RunConfig, change: str) -> RunConfig:
    """`config` with the settings of `change` replaced. Values other than numbers and texts are JSON: true, [8, 16]."""
    for setting in filter(None, change.split(",")):
        option, value = setting.split("=")
        section, _, field = option.rpartition(".")
        part = getattr(config, section) if section else config
        old = getattr(part, field)
        plain = isinstance(old, int | float | str) and not isinstance(old, bool)
        new = type(old)(value) if plain else json.loads(value)
        part = dataclasses.replace(part, **{field: new})
        config = dataclasses.replace(config, **{section: part}) if section else part
    return config


def _train(run: Run, config: RunConfig, stage: str, logits: TeacherLogits) -> dict[str, Any]:
    recipe = student_recipe(config, stage)
    model = run.runtime.place(build_student(config, run.data.info))
    training = start_training(run, Job(stage, stage, config), model, recipe)
    guidance = logits if recipe.loss.alpha > 0 else None
    train(training, recipe, run.data, guidance, run.runtime, lambda _: None)
    widths = [epoch["width"] for epoch in training.epochs if "width" in epoch]
    return {**training.epochs[-1], "widths": widths}


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_search", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run with a finished teacher")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--stage", choices=("scratch", "kd", "kddp"), default="kd")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("recipe_search.json"), help="the file for the results")
    parser.add_argument("changes", nargs="+", metavar="CHANGE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
