"""Width and validation accuracy of a run's student over the epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from shapes import ORANGE, RED


def draw(run: Path) -> Figure:
    """The picture of the folder of a finished run, such as runs/digits."""
    kd, kddp = (_epochs(run / stage / "metrics.jsonl") for stage in ("kd", "kddp"))
    figure = Figure(figsize=(9.2, 3.4), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    _widths(left, json.loads((run / "kd" / "result.json").read_text(encoding="utf-8"))["width"], kddp)
    _accuracies(right, kd, kddp)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, len(kddp) + 0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _epochs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _widths(axes: Axes, start: int, kddp: list[dict[str, Any]]) -> None:
    widths = [epoch["width"] for epoch in kddp]
    axes.axhline(start, color=ORANGE, linewidth=1.6, linestyle="--", label="KD, constant width")
    # The line of an epoch has the width after its check; the epoch itself trained at the width before.
    axes.step(range(len(widths) + 1), [start, *widths], where="post", color=RED, linewidth=2.2, label="KDDP")
    axes.annotate(str(widths[-1]), (len(widths), widths[-1]), xytext=(0, 7), textcoords="offset points", ha="right",
                  color=RED, fontweight="bold")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_title("Neurons of the hidden layer", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _accuracies(axes: Axes, kd: list[dict[str, Any]], kddp: list[dict[str, Any]]) -> None:
    for epochs, name, colour, style in ((kd, "KD", ORANGE, "--"), (kddp, "KDDP", RED, "-")):
        steps, shares = [epoch["epoch"] for epoch in epochs], [100 * epoch["validation_accuracy"] for epoch in epochs]
        axes.plot(steps, shares, color=colour, linestyle=style, linewidth=2, label=name)
    axes.set_title("Validation accuracy (%)", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="center right")
