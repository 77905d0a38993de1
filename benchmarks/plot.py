"""The picture of the loss comparison: speed-up over eager and torch.compile, and share of copy bandwidth."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from benchmarks.comparisons.loss import share_of_bandwidth
from kddp_ext.workflow.plots import save_picture

_COLOURS = {"eager": "#3b78b5", "torch.compile": "#e08a1e", "kddp_ext": "#c0354a"}
_THICKNESS = 0.36
_LIGHT = 0.35  # opacity of the part that only one of the heaps reaches
_GREY = "#6b7280"


def draw(path: str, by_heap: dict[str, dict[str, Any]], head: str) -> None:
    """Draw the results of the loss comparison, by heap, into a PNG file. `head` describes the machine."""
    figure = Figure(figsize=(11, 6.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _speed_ups(left, by_heap)
    _bandwidth(right, by_heap)
    shapes = [shape["shape"] for shape in by_heap["warm"]["shapes"]]
    left.set_yticks(range(len(shapes)), [shape.replace(" ", "\n", 1) for shape in shapes])
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.12)
    note = (
        "Loss of rows×classes logits with one layer's activations, forward + backward. Ranges are over a warm heap "
        "and the C library's default heap. "
    )
    figure.supxlabel("\n".join(textwrap.wrap(note + head, 190)), fontsize=7, color=_GREY, x=0.01, ha="left")
    save_picture(figure, Path(path))


def _speed_ups(axes: Axes, by_heap: dict[str, dict[str, Any]]) -> None:
    """Bars of each implementation's time relative to this package's."""
    results = list(by_heap.values())
    others = list(results[0]["shapes"][0]["times_kddp_ext"])
    for number, name in enumerate(others):
        offset = (number - (len(others) - 1) / 2) * _THICKNESS
        for place, in_heaps in enumerate(zip(*(result["shapes"] for result in results), strict=True)):
            ratios = [shape["times_kddp_ext"][name]["median"] for shape in in_heaps]
            label = f"against {name}" if place == 0 else ""
            _range(axes, place + offset, ratios, _COLOURS[name], "{:.1f}".format, "x", label)
    axes.axvline(1, color=_GREY, linewidth=1, linestyle="--")
    axes.set_title("Speed-up of the loss", loc="left")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="best")


def _bandwidth(axes: Axes, by_heap: dict[str, dict[str, Any]]) -> None:
    """Bars of the needed bytes a second relative to a copy."""
    results = list(by_heap.values())
    for place in range(len(results[0]["shapes"])):
        shares = [100 * share_of_bandwidth(result["shapes"][place], result) for result in results]
        _range(axes, place, shares, _COLOURS["kddp_ext"], "{:.0f}".format, "%", "")
    axes.set_title("Its share of copy bandwidth", loc="left")
    axes.xaxis.set_major_locator(MultipleLocator(25))
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_xlim(0, 110)


def _range(axes: Axes, y: float, values: list[float], colour: str, number: Any, unit: str, label: str) -> None:
    """A bar up to the lowest value, a light one up to the highest, and both as text."""
    low, high = min(values), max(values)
    axes.barh(y, low, height=_THICKNESS, color=colour, label=label)
    axes.barh(y, high - low, left=low, height=_THICKNESS, color=colour, alpha=_LIGHT)
    written = dict.fromkeys([number(low), number(high)])  # one if they round to the same text
    axes.annotate(
        "–".join(written) + unit, (high, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
    )
