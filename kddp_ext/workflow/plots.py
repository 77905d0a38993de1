"""The picture of a run or a sweep: accuracy against size, the widths, and the ablations."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from kddp_ext.files import atomic_write

if TYPE_CHECKING:
    from kddp_ext.workflow.report import Measured

# Label, colour, marker and marker size of each kind of point. A small filled marker stays visible inside a large hollow
# one, as networks of different kinds often coincide: scratch and kd have the same size, and so do kddp and kd at the
# width that it found.
STYLES: dict[str, tuple[str, str, str, int]] = {
    "teacher": ("teacher", "#8a8f98", "s", 8),
    "scratch": ("student alone", "#3b78b5", "o", 14),
    "kd": ("KD", "#e08a1e", "D", 6),
    "kd-at-found-width": ("KD at the width that KDDP found", "#e08a1e", "D", 15),
    "kddp": ("KDDP", "#c0354a", "*", 9),
}


def draw(path: Path, measured: Sequence[Measured], title: str) -> None:
    """Draw the finished points into a PNG file. Error bars are standard deviations over seeds."""
    ablations = [each for each in measured if each.point.kind == "ablation"]
    kddp = [each for each in measured if each.point.kind == "kddp"]
    panels = 3 if ablations else 2
    figure = Figure(figsize=(5.4 * panels, 5), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes_of = figure.subplots(1, panels)
    _accuracy_against_parameters(axes_of[0], measured)
    _widths(axes_of[1], kddp, [each for each in measured if each.point.kind == "kd"])
    if ablations:
        _ablations(axes_of[2], [*reversed(ablations), *(each for each in kddp if each.point.is_base)])
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:  # below the panel, where it covers nothing
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    save_picture(figure, path)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    atomic_write(path, lambda file: file.write(picture.getbuffer()))


def _accuracy_against_parameters(axes: Axes, measured: Sequence[Measured]) -> None:
    axes.set(title="Accuracy against size", xlabel="parameters (log scale)", ylabel="test accuracy (%)", xscale="log")
    for kind, (label, color, marker, size) in STYLES.items():
        found = sorted((each for each in measured if each.point.kind == kind), key=lambda each: each.mean("parameters"))
        if found:
            axes.errorbar(
                [each.mean("parameters") for each in found],
                [100 * each.mean("test_accuracy") for each in found],
                yerr=_deviations(found),
                label=label,
                color=color,
                marker=marker,
                markersize=size,
                fillstyle="none" if size > 10 else "full",
                linestyle="-" if kind == "kd" else "none",
                linewidth=1.4,
                capsize=3,
            )
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.1, high * 1.1)
    ratio = high / low
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if ratio > 20 else (1, 2, 5) if ratio > 3 else range(1, 10)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _deviations(shown: Sequence[Measured]) -> list[float] | None:
    """The standard deviations of the accuracies in percent; None where there is one seed."""
    accuracies = [[100 * value for value in each.values("test_accuracy")] for each in shown]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in accuracies]
    return deviations if any(len(values) > 1 for values in accuracies) else None


def _widths(axes: Axes, kddp: Sequence[Measured], kd: Sequence[Measured]) -> None:
    axes.set(title="KDDP finds the width", xlabel="epoch", ylabel="neurons of the pruned layers")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    start = max((result["width"] or 0 for each in kd for result in each.results), default=0)
    for number, each in enumerate(kddp):
        final = statistics.fmean(epochs[-1]["width"] for epochs in each.epochs)
        shade = 1 - 0.65 * number / max(len(kddp), 1)
        for index, epochs in enumerate(each.epochs):
            weight = each.jobs[index].config.pruning.l1_weight
            axes.plot(
                [epoch["epoch"] for epoch in epochs],
                [epoch["width"] for epoch in epochs],
                color=STYLES["kddp"][1],
                alpha=shade,
                linewidth=1.8,
                label=f"KDDP, l1-weight {weight:g}: {final:.0f}" if index == 0 else None,
            )
    if start and kddp and kddp[0].jobs[0].config.pruning.layers == "hidden":
        axes.axhline(start, color=STYLES["kd"][1], linewidth=1.5, linestyle="--", label=f"KD: {start:,}")
    axes.set_ylim(bottom=0)


def _ablations(axes: Axes, shown: Sequence[Measured]) -> None:
    axes.set(title="KDDP with one thing changed", xlabel="test accuracy (%); final width in brackets")
    axes.errorbar(
        [100 * each.mean("test_accuracy") for each in shown],
        range(len(shown)),
        xerr=_deviations(shown),
        color="#7c8794",
        marker="o",
        linestyle="none",
        capsize=3,
    )
    labels = ["unchanged" if each.point.is_base else each.point.label.removeprefix("kddp, ") for each in shown]
    widths = ["" if each.results[0]["width"] is None else f" ({each.mean('width'):.0f})" for each in shown]
    axes.set_yticks(range(len(shown)), [label + width for label, width in zip(labels, widths, strict=True)])
