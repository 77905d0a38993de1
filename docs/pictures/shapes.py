"""The elements of the diagrams: a canvas with its own units, boxes, arrows, matrices of cells."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Outline

INK, GREY, PALE = "#1f2937", "#6b7280", "#eef1f5"
BLUE, ORANGE, RED, GREEN = "#3b78b5", "#c9740f", "#c0354a", "#3d8a4e"
_INCHES = 0.63  # of one unit


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty white sheet of the given size in units."""
    figure = Figure(figsize=(width * _INCHES, height * _INCHES), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a picture as SVG with text as outlines, or as PNG; the same drawing gives the same bytes."""
    content = io.BytesIO()
    settings = {"svg.hashsalt": path.stem, "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=metadata)
    path.write_bytes(content.getbuffer())


def text(axes: Axes, x: float, y: float, words: str, **style: Any) -> None:
    """Words around a point."""
    axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": 10, "color": INK, "zorder": 5, **style})


def box(
    axes: Axes, x: float, y: float, width: float, height: float, words: str = "", colour: str = GREY, **style: Any
) -> None:
    """A rounded box whose lower left corner is (x, y), with words in its middle."""
    outline = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=style.pop("fill", "white"),
        edgecolor=colour,
        linewidth=1.6,
        zorder=2,
    )
    axes.add_patch(outline)
    if words:
        text(axes, x + width / 2, y + height / 2, words, **style)


def arrow(axes: Axes, points: Sequence[tuple[float, float]], colour: str = INK, **style: Any) -> None:
    """An arrow along straight lines through the points."""
    axes.add_patch(
        FancyArrowPatch(
            path=Outline(points),
            arrowstyle=style.pop("head", "-|>"),
            mutation_scale=13,
            color=colour,
            joinstyle="round",
            **{"linewidth": 1.6, "zorder": 3, **style},
        )
    )


def matrix(
    axes: Axes,
    x: float,
    top: float,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    cell: float,
    colour: str,
    gone_rows: Collection[int] = (),
    gone_columns: Collection[int] = (),
) -> None:
    """Cells from (x, top) to the right and down, one for each row and column given; removed ones are hatched."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            gone = row in gone_rows or column in gone_columns
            face = "#fbe3e7" if gone else _tint(colour, row, column)
            axes.add_patch(
                Rectangle(
                    (x + j * cell, top - (i + 1) * cell),
                    cell,
                    cell,
                    facecolor=face,
                    edgecolor=RED if gone else "white",
                    linewidth=0.8,
                    hatch="////" if gone else None,
                    zorder=3 + gone,
                )
            )


def _tint(colour: str, row: int, column: int) -> str:
    """The shade of `colour` for a cell, so that a remaining cell can be recognised."""
    share = 0.25 + 0.5 * ((row * 7 + column * 11) % 13) / 12
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - value)):02x}" for value in (red, green, blue))
