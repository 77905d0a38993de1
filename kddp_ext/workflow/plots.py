"""The picture of a run: accuracy against size, width over the epochs, and the terms of the loss."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from kddp_ext.files import atomic_write
from kddp_ext.workflow.job import Stage

PICTURE = "report.png"

# Of a run's stages, and of a sweep's points that are trained alike.
COLOURS = {"teacher": "#8a8f98", "scratch": "#3b78b5", "kd": "#e08a1e", "kddp": "#c0354a"}
MARKERS = {"teacher": "s", "scratch": "o", "kd": "D", "kddp": "*"}
_NAMES = {"teacher": "Teacher", "scratch": "Student alone", "kd": "KD", "kddp": "KDDP"}


def draw(
    path: Path, stages: dict[Stage, dict[str, Any]], epochs: dict[Stage, list[dict[str, Any]]], title: str
) -> None:
    """Draw the finished stages of a run into a PNG file."""
    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    left, middle, right = figure.subplots(1, 3)
    _accuracy_against_parameters(left, stages)
    _width(middle, stages, epochs.get("kddp", []))
    _loss_terms(right, epochs.get("kddp", []))
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Give all panels of `figure` the reports' frame and grid, and write it into a PNG file."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    atomic_write(path, lambda file: file.write(picture.getbuffer()))


def _accuracy_against_parameters(axes: Axes, stages: dict[Stage, dict[str, Any]]) -> None:
    for stage, result in stages.items():
        size = 260 if MARKERS[stage] == "*" else 80
        x, y = result["parameters"], 100 * result["test_accuracy"]
        axes.scatter(x, y, s=size, color=COLOURS[stage], marker=MARKERS[stage], label=_NAMES[stage], zorder=3)
    if {"kd", "kddp"} <= stages.keys():
        _reduction(axes, stages["kd"], stages["kddp"])
    describe_accuracy_against(axes, "parameters", ticks=(1, 2, 5))
    axes.margins(0.25)


def describe_accuracy_against(axes: Axes, size: str, ticks: tuple[int, ...]) -> None:
    """Scales, titles and legend of a panel of accuracies against what `size` says, with so many ticks a decade."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Accuracy against size")
    axes.set_xlabel(f"{size} (log scale)")
    axes.set_ylabel("test accuracy (%)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best")


def _reduction(axes: Axes, kd: dict[str, Any], kddp: dict[str, Any]) -> None:
    """An arrow from KD to KDDP that says how much smaller it is."""
    start, end = ((result["parameters"], 100 * result["test_accuracy"]) for result in (kd, kddp))
    arrow = {"arrowstyle": "->", "color": COLOURS["kddp"], "shrinkA": 8, "shrinkB": 12}
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
    middle = ((start[0] * end[0]) ** 0.5, (start[1] + end[1]) / 2)
    axes.annotate(
        f"{kd['parameters'] / kddp['parameters']:.1f}x smaller",
        middle,
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        color=COLOURS["kddp"],
    )


def _width(axes: Axes, stages: dict[Stage, dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    axes.set_title("KDDP finds the width")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("neurons of the hidden layer")
    if not epochs:
        return
    steps = [epoch["epoch"] for epoch in epochs]
    widths = [epoch["width"] for epoch in epochs]
    if "kd" in stages:
        # An epoch trains with the width that the check before it left.
        start = stages["kd"]["width"]
        steps, widths = [0, *steps], [start, *widths]
        axes.axhline(start, color=COLOURS["kd"], linewidth=1.5, linestyle="--", label="KD")
    axes.plot(steps, widths, color=COLOURS["kddp"], linewidth=2.2, marker="o", markersize=4, label="KDDP")
    axes.annotate(
        str(widths[-1]),
        (steps[-1], widths[-1]),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
        color=COLOURS["kddp"],
        fontweight="bold",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _loss_terms(axes: Axes, epochs: list[dict[str, Any]]) -> None:
    axes.set_title("Terms of KDDP's loss")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("mean over the epoch (log scale)")
    if not epochs:
        return
    steps = [epoch["epoch"] for epoch in epochs]
    for term, name, colour in (
        ("kd", "KD", COLOURS["kd"]),
        ("cross_entropy", "cross-entropy", COLOURS["scratch"]),
        ("l1", "L1 of the activations", "#4c9a5b"),
    ):
        axes.plot(
            steps,
            [epoch[term] for epoch in epochs],
            color=colour,
            linewidth=2,
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set_yscale("log")
    axes.legend(frameon=False)
