"""The picture of a sweep: accuracy against size, the widths over the epochs, and the ablations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kddp_ext.workflow.plots import COLOURS, MARKERS, describe_accuracy_against, save_figure
from kddp_ext.workflow.sweep_results import Measured

PICTURE = "report.png"

_COLOURS = {**COLOURS, "kd-at-found-width": COLOURS["kd"], "ablation": "#7c8794"}
_MARKERS = {**MARKERS, "kd-at-found-width": MARKERS["kd"]}
_NAMES = {
    "scratch": "Student alone",
    "kd": "KD, widths given",
    "kd-at-found-width": "KD, widths that KDDP found",
    "kddp": "KDDP",
}


def draw_sweep(path: Path, measured: Sequence[Measured], title: str) -> None:
    """Draw what is finished of a sweep into a PNG file. Bars and whiskers are standard deviations over seeds."""
    ablations = [each for each in measured if each.point.kind == "ablation"]
    figure = Figure(figsize=(17 if ablations else 12, 5), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    panels = figure.subplots(1, 3 if ablations else 2)
    _accuracy_against_parameters(panels[0], measured)
    _widths(panels[1], [each for each in measured if each.point.kind == "kddp"])
    if ablations:
        _ablations(panels[2], measured, ablations)
    save_figure(figure, path)


def _accuracy_against_parameters(axes: Axes, measured: Sequence[Measured]) -> None:
    for kind, name in _NAMES.items():
        found = sorted(
            (each for each in measured if each.point.kind == kind), key=lambda each: each.mean("linear_parameters")
        )
        if found:
            axes.errorbar(
                [each.mean("linear_parameters") for each in found],
                [100 * each.mean("test_accuracy") for each in found],
                yerr=[100 * (each.deviation("test_accuracy") or 0.0) for each in found],
                color=_COLOURS[kind],
                marker=_MARKERS[kind],
                markersize=14 if kind == "kddp" else 7,
                markerfacecolor="white" if kind == "kd-at-found-width" else None,
                linestyle="-" if kind == "kd" else "none",
                linewidth=1.4,
                capsize=3,
                label=name,
                zorder=3,
            )
    describe_accuracy_against(axes, "parameters of the fully-connected layers", ticks=(1, 3))


def _widths(axes: Axes, measured: Sequence[Measured]) -> None:
    axes.set_title("KDDP finds the width")
    axes.set_xlabel("epoch")
    axes.set_ylabel("neurons (log scale)")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for number, each in enumerate(measured):
        shade = 0.35 + 0.65 * number / max(len(measured) - 1, 1)
        for index, epochs in enumerate(each.epochs):
            axes.plot(
                [epoch["epoch"] for epoch in epochs],
                [epoch["width"] for epoch in epochs],
                color=_COLOURS["kddp"],
                alpha=shade,
                linewidth=1.8,
                label=each.point.label.removeprefix("KDDP, ") if index == 0 else None,
            )
    if measured:
        axes.legend(frameon=False)


def _ablations(axes: Axes, measured: Sequence[Measured], ablations: Sequence[Measured]) -> None:
    base = [each for each in measured if each.point.is_base]
    shown = [*reversed(ablations), *base]
    axes.set_title("KDDP with one thing changed")
    axes.errorbar(
        [100 * each.mean("test_accuracy") for each in shown],
        range(len(shown)),
        xerr=[100 * (each.deviation("test_accuracy") or 0.0) for each in shown],
        color=_COLOURS["ablation"],
        marker="o",
        linestyle="none",
        capsize=3,
    )
    labels = [f"{each.point.label} ({each.mean('width'):.0f})" for each in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_xlabel("test accuracy (%); neurons found in brackets")
