"""The figures of the CIFAR-10 study, one a picture, from the JSON file of its trainings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from shapes import BLUE, GREY, ORANGE, RED

Trainings = Sequence[Mapping[str, Any]]  # one of each seed
Study = Mapping[str, Trainings]  # by the name of the student
_BASE = "kddp, l1-weight 0.001"
# Label, colour, marker and how the names of the students begin.
_SERIES = (
    ("KDDP: the training finds the width", RED, "*", "kddp, l1-weight "),
    ("KD, width given", ORANGE, "D", "kd, width "),
    ("KD, at a width that KDDP found", ORANGE, "d", "kd at the width "),
    ("labels only", BLUE, "o", "scratch"),
)


def pictures(path: Path) -> dict[str, Figure]:
    """All pictures by name, from a file such as docs/cifar10-study.json."""
    study = json.loads(path.read_text(encoding="utf-8"))["cnn5"]
    drawn: tuple[tuple[str, Callable[[Axes, Study], None]], ...] = (
        ("accuracy", _accuracies),
        ("widths", _widths),
        ("ablations", _ablations),
    )
    figures = {}
    for name, draw in drawn:
        figure = Figure(figsize=(8, 4.2), facecolor="white", layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        draw(axes, study)
        figures[f"study-{name}"] = figure
    return figures


def _mean(trainings: Trainings, key: str) -> float:
    return statistics.fmean(training[key] for training in trainings)


def _percent(trainings: Trainings) -> tuple[float, float]:
    """Mean and standard deviation of the test accuracy in percent; 0 for one seed."""
    values = [100 * training["test_accuracy"] for training in trainings]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _accuracies(axes: Axes, study: Study) -> None:
    for label, colour, marker, prefix in _SERIES:
        shown = [trainings for name, trainings in study.items() if name.startswith(prefix)]
        shown.sort(key=lambda trainings: _mean(trainings, "linear_parameters"))
        accuracies, deviations = zip(*map(_percent, shown), strict=True)
        axes.errorbar(
            [_mean(trainings, "linear_parameters") for trainings in shown],
            accuracies,
            yerr=deviations,
            label=label,
            color=colour,
            marker=marker,
            markersize=13 if marker == "*" else 8,
            fillstyle="none" if marker == "d" else "full",
            linestyle="-" if marker == "D" else "none",
            capsize=3,
        )
    axes.set(xscale="log", xlabel="parameters of the fully-connected layers (log scale)", ylabel="test accuracy (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, loc="lower center")


def _widths(axes: Axes, study: Study) -> None:
    kddp = {name: trainings for name, trainings in study.items() if name.startswith("kddp, l1-weight ")}
    for number, (name, trainings) in enumerate(kddp.items(), 1):
        for training in trainings:
            axes.plot(range(1, len(training["widths"]) + 1), training["widths"], color=RED, alpha=number / len(kddp))
        axes.lines[-1].set_label(f"{name}: {_mean(trainings, 'width'):.0f} neurons left")
    axes.set(yscale="log", xlabel="epoch", ylabel="hidden neurons (log scale)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)


def _ablations(axes: Axes, study: Study) -> None:
    changed = [name for name in study if name.startswith("kddp, ") and not name.startswith("kddp, l1-weight ")]
    names = [*reversed(changed), _BASE]
    accuracies, deviations = zip(*(_percent(study[name]) for name in names), strict=True)
    axes.errorbar(accuracies, range(len(names)), xerr=deviations, color=GREY, marker="o", linestyle="none", capsize=3)
    labels = ["unchanged" if name == _BASE else name.removeprefix("kddp, ") for name in names]
    widths = [_mean(study[name], "width") for name in names]
    axes.set_yticks(range(len(names)), [f"{label} ({width:.0f})" for label, width in zip(labels, widths, strict=True)])
    axes.set_xlabel("test accuracy (%); neurons left in brackets")
