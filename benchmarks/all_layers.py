"""Trains cnn5 with KD at several widths of all its layers, and with KDDP in all layers from 1.41 times its channels.

python -m benchmarks.all_layers TEACHER --folder DIR --data-dir DIR [--validation N] [CHANGE ...]

TEACHER is the folder of a finished teacher of `kddp run --dataset cifar10`. Each CHANGE is a setting of KDDP, such as
"pruning.until=0.6". A training that is finished is not repeated, and processes that are started with the same folder
share the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from rich.console import Console

from benchmarks.recipe_search import changed
from benchmarks.shrinking import finished, mean_accuracy
from benchmarks.table import Table, write_markdown
from kddp_ext.workflow.config import PruningConfig, RunConfig, preset
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import read_dataset
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import Job, Stage
from kddp_ext.workflow.measure import accuracy, count_macs, count_parameters
from kddp_ext.workflow.models import build_student
from kddp_ext.workflow.plots import save_picture
from kddp_ext.workflow.runs import Run, start_training
from kddp_ext.workflow.runtime import Runtime, prepare_process
from kddp_ext.workflow.saved_models import find_model
from kddp_ext.workflow.teacher_logits import TeacherLogits
from kddp_ext.workflow.train import student_recipe, train

_START = 1.41  # times the standard channels, where KDDP begins: twice the multiply-accumulates
_STEPS = 24  # between two checks: eight checks in a pass of 195 steps


class AllLayers:
    """What all trainings share: the data, the teacher's logits, and the size of the standard network."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        saved = find_model(arguments.teacher)
        own = preset("cifar10", "default")
        self.config = replace(saved.config, validation=arguments.validation, student=own.student, pruning=own.pruning)
        self.changes = ",".join(arguments.changes)
        self.runtime = Runtime("auto", self.config.precision)
        raw = read_dataset(self.config.dataset, arguments.data_dir)
        self.data = ImageData(raw, saved.info, self.config, self.runtime.device)
        self.run = Run(RunFolder(arguments.folder), self.data, self.runtime, Console(stderr=True))
        teacher = self.runtime.place(saved.load())
        folder = arguments.folder / "teacher_logits"
        self.logits = TeacherLogits(teacher, self.data, self.config.student.shift, folder, self.runtime)
        self.split = self.data.validation if arguments.validation else self.data.test
        standard = self.runtime.place(build_student(self.config, self.data.info))
        self.macs, self.parameters = count_macs(standard, self.data.example()), count_parameters(standard)

    def kd(self, factor: float, seed: int) -> dict[str, Any]:
        """KD with `factor` times the channels and hidden neurons."""
        return self.train("kd", self.scaled(factor, seed))

    def kddp(self, share: float, seed: int) -> dict[str, Any]:
        """KDDP down to this share of the standard network's multiply-accumulates and parameters."""
        config = self.scaled(_START, seed)
        start = build_student(config, self.data.info)
        pruning = PruningConfig(
            l1_weight=0.0,
            layers="all",
            steps=_STEPS,
            start=0.17,  # after two of twelve epochs
            until=0.5,
            criterion="saliency",
            target_macs=share * self.macs / count_macs(start, self.data.example().cpu()),
            target_parameters=share * self.parameters / count_parameters(start),
        )
        return self.train("kddp", changed(replace(config, pruning=pruning), self.changes))

    def scaled(self, factor: float, seed: int) -> RunConfig:
        """The settings with `factor` times the channels and hidden neurons of the standard network."""
        student = self.config.student
        channels = tuple(round(each * factor) for each in student.channels)
        return replace(
            self.config, seed=seed, student=replace(student, channels=channels, width=round(student.width * factor))
        )

    def train(self, stage: Stage, config: RunConfig) -> dict[str, Any]:
        """Train a student; returns its figures. Only this function looks at the test images, once."""
        recipe = student_recipe(config, stage)
        model = self.runtime.place(build_student(config, self.data.info))
        training = start_training(self.run, Job(stage, stage, config), model, recipe)
        for view in range(config.student.views):
            self.logits.view(view)  # not a part of the seconds
        started = time.process_time()

        def say(metrics: dict[str, Any]) -> None:
            print(f"{stage}: {metrics}", flush=True)

        train(training, recipe, self.data, self.logits, self.runtime, say)
        return {
            "processor_seconds": time.process_time() - started,
            "accuracy": accuracy(model, self.data, self.split, self.runtime),
            "macs": count_macs(model, self.data.example()),
            "parameters": count_parameters(model),
            "widths": training.history.widths,
        }


def main() -> None:
    """Run everything that is not finished, then write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="folder of a finished teacher")
    parser.add_argument("--folder", type=Path, required=True, help="where results are kept")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validation", type=int, default=0, help="images to choose settings by, instead of the test's")
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0, 0.5, 0.71, 1.41], help="widths of KD")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.97, 0.5], help="targets of KDDP")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", metavar="FILE", help="fill the table of this page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against size into this PNG file")
    parser.add_argument("changes", nargs="*", metavar="CHANGE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    study = AllLayers(arguments)
    for seed in arguments.seeds:
        for kind, run, sizes in (("kddp", study.kddp, arguments.shares), ("kd", study.kd, arguments.factors)):
            for size in sizes:
                finished(arguments.folder, f"{kind}, {size:g}, seed {seed}", lambda r=run, x=size, s=seed: r(x, s))
    points = read_points(arguments.folder)
    table = table_of(points)
    if arguments.markdown:
        write_markdown(arguments.markdown, None, [table])
    if arguments.plot:
        draw(arguments.plot, points)
    Console().print(table.for_terminal())


def read_points(folder: Path) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The results of all seeds by "kd" or "kddp" and by size, the smallest first."""
    points: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for path in folder.glob("kd*, seed *.json"):
        kind, size, _ = path.stem.split(", ")
        points.setdefault((kind, float(size)), []).append(json.loads(path.read_text()))
    return dict(sorted(points.items()))


def table_of(points: dict[tuple[str, float], list[dict[str, Any]]]) -> Table:
    """A row for each point: means over the seeds."""
    rows = []
    for (kind, size), results in points.items():
        name = f"KD, {size:g} times the standard width" if kind == "kd" else f"KDDP to {size:.0%} of the standard size"
        mean = {key: statistics.fmean(each[key] for each in results) for key in ("macs", "parameters")}
        seconds = statistics.fmean(each["processor_seconds"] for each in results)
        rows.append([name, str(len(results)), mean_accuracy(results), f"{mean['macs'] / 1e6:.2f}",
                     f"{mean['parameters']:,.0f}", f"{seconds:.0f}"])  # fmt: skip
    columns = ["student", "seeds", "test accuracy (%)", "MACs (million)", "parameters", "processor s"]
    return Table("all-layers", "cnn5: mean ± standard deviation over the seeds", columns, rows)


def draw(path: Path, points: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """Accuracy against multiply-accumulates and against parameters."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("macs", "parameters"), ("multiply-accumulates", "parameters"), strict=True):
        for kind, colour in (("kd", "#3b78b5"), ("kddp", "#c0354a")):
            chosen = [results for (name, _), results in points.items() if name == kind]
            x = [statistics.fmean(each[key] for each in results) for results in chosen]
            scores = [[100 * each["accuracy"] for each in results] for results in chosen]
            spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in scores]
            axes.errorbar(
                x, [statistics.fmean(each) for each in scores], spread, fmt="o-", color=colour, label=kind.upper()
            )
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(frameon=False)
    save_picture(figure, path)


if __name__ == "__main__":
    main()
