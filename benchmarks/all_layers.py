"""Trains cnn5 with KD at several widths of all its layers, and with KDDP in all layers from 1.41 times its channels.

python -m benchmarks.all_layers SOURCE --folder DIR --data-dir DIR [--validation N] [--changes CHANGE ...]

SOURCE is the folder of a finished teacher of `kddp run --dataset cifar10`. Each CHANGE is a setting of KDDP, such as
"pruning.until=0.6". A training that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from benchmarks.table import Table
from benchmarks.trainings import Study, changed, mean_accuracy, over_seeds, show, study_parser
from kddp_ext.workflow.config import PruningConfig, RunConfig, preset
from kddp_ext.workflow.measure import count_macs, count_parameters
from kddp_ext.workflow.models import build_student
from kddp_ext.workflow.plots import save_picture

_START = 1.41  # times the standard channels, where KDDP begins: twice the multiply-accumulates
_STEPS = 24  # between two checks: eight checks in a pass of 195 steps


class AllLayers(Study):
    """The trainings, and the size of the standard network."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        own = preset("cifar10", "default")
        self.config = replace(self.config, student=own.student, pruning=own.pruning)
        self.changes = ",".join(arguments.changes)
        standard = self.runtime.place(build_student(self.config, self.data.info))
        self.macs, self.parameters = count_macs(standard, self.data.example()), count_parameters(standard)

    def kd(self, factor: float, seed: int) -> dict[str, Any]:
        """KD with `factor` times the channels and hidden neurons."""
        return self.student("kd", self.scaled(factor, seed))

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
        return self.student("kddp", changed(replace(config, pruning=pruning), self.changes))

    def scaled(self, factor: float, seed: int) -> RunConfig:
        """The settings with `factor` times the channels and hidden neurons of the standard network."""
        student = self.config.student
        channels = tuple(round(each * factor) for each in student.channels)
        return replace(
            self.config, seed=seed, student=replace(student, channels=channels, width=round(student.width * factor))
        )


def main() -> None:
    """Run everything that is not finished, then write the table and the picture."""
    parser = study_parser(__doc__)
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0, 0.5, 0.71, 1.41], help="widths of KD")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.97, 0.5], help="targets of KDDP")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against size into this PNG file")
    parser.add_argument("--changes", nargs="*", metavar="CHANGE", default=[])
    arguments = parser.parse_args()
    study = AllLayers(arguments)
    for seed in arguments.seeds:
        for kind, run, sizes in (("kddp", study.kddp, arguments.shares), ("kd", study.kd, arguments.factors)):
            for size in sizes:
                study.finish(f"{kind}, {size:g}, seed {seed}", lambda r=run, x=size, s=seed: r(x, s))
    points = read_points(arguments.folder)
    if arguments.plot:
        draw(arguments.plot, points)
    show([table_of(points)], arguments.markdown)


def read_points(folder: Path) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The results of all seeds by "kd" or "kddp" and by size, the smallest first."""
    points: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for name, results in over_seeds(folder).items():
        kind, size = name.split(", ")
        points[kind, float(size)] = results
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
