"""A layer before and after a prune: the removed slices of all tensors, and the compensation."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from shapes import BLUE, GREEN, GREY, ORANGE, RED, arrow, canvas, matrix, text

NEURONS, GONE, INPUTS, OUTPUTS = range(8), (2, 4, 5), range(7), range(5)
KEPT = [neuron for neuron in NEURONS if neuron not in GONE]
CELL, SHEET = 0.27, 0.1
# Where each tensor begins.
W1, B1, NORM, W2, B2 = 0.75, 3.55, 4.75, 8.3, 11.5


def draw() -> Figure:
    """The whole picture."""
    figure, axes = canvas(13.2, 8.3)
    _before(axes, top=6.75)
    _after(axes, top=2.35)
    return figure


def _before(axes: Axes, top: float) -> None:
    text(axes, 0.2, 7.98, "Before: 8 neurons, 3 of them inactive", fontweight="bold", fontsize=11, ha="left")
    for x, name, meaning in (
        (W1 + 3.5 * CELL, "W₁", "one row each"),
        (B1 + 0.5 * CELL, "b₁", "an entry"),
        (NORM + 2 * CELL, "BatchNorm", "an entry of each"),
        (W2 + 4 * CELL, "W₂", "one column each"),
        (B2 + 0.5 * CELL, "b₂", "of the next layer"),
    ):
        text(axes, x, top + 0.75, name, fontweight="bold")
        text(axes, x, top + 0.44, meaning, fontsize=8.5, color=GREY)
    _tensors(axes, top, list(NEURONS), GONE)
    below = top - len(OUTPUTS) * CELL - 0.17
    for neuron in GONE:
        for x, y in ((W1 - 0.3, top - (neuron + 0.5) * CELL), (W2 + (neuron + 0.5) * CELL, below)):
            text(axes, x, y, f"{neuron}", color=RED, fontsize=9, fontweight="bold")
    bottom = top - len(NEURONS) * CELL
    text(axes, W1, bottom - 0.3, "hatched: removed, with its gradient", fontsize=9, color=RED, ha="left")
    text(axes, W1, bottom - 0.65, "sheets behind: Adam's two moments, sliced alike", fontsize=9, color=GREY, ha="left")
    _compensation(axes, below)


def _after(axes: Axes, top: float) -> None:
    words = "After: 5 neurons, in smaller tensors of the same Parameters"
    text(axes, 0.2, top + 0.7, words, fontweight="bold", fontsize=11, ha="left")
    _tensors(axes, top, KEPT, ())
    bottom = top - len(OUTPUTS) * CELL
    for x, columns in ((W2, len(KEPT)), (B2, 1)):
        place = (x - 0.03, bottom - 0.03), columns * CELL + 0.06, len(OUTPUTS) * CELL + 0.06
        axes.add_patch(Rectangle(*place, facecolor="none", edgecolor=ORANGE, linewidth=2.2, zorder=6))
    text(axes, W2, bottom - 0.35, "took over the effect of the others", fontsize=9, color=ORANGE, ha="left")
    words = "the rest keeps its values and its order"
    text(axes, W1, bottom - 0.35, words, fontsize=9, color=GREEN, ha="left")


def _tensors(axes: Axes, top: float, neurons: list[int], gone: tuple[int, ...]) -> None:
    """W₁, b₁ and the BatchNorm of some neurons, and the W₂ and b₂ that read them."""
    for x, rows, columns, gone_rows, gone_columns, colour in (
        (W1, neurons, INPUTS, gone, (), GREEN),
        (B1, neurons, [3], gone, (), GREEN),
        (NORM, neurons, range(4), gone, (), GREY),
        (W2, OUTPUTS, neurons, (), gone, BLUE),
        (B2, OUTPUTS, [4], (), (), BLUE),
    ):
        if x != NORM:
            _moments(axes, x, top, len(rows), len(columns))
        going = {"gone_rows": gone_rows, "gone_columns": gone_columns}
        matrix(axes, x, top, rows, columns, cell=CELL, colour=colour, **going)
    middle, start = top - 2.5 * CELL, NORM + 4 * CELL
    arrow(axes, [(start + 0.25, middle), (W2 - 0.2, middle)], GREY)
    text(axes, (start + W2) / 2, middle + 0.24, "ReLU", fontsize=9, color=GREY)
    text(axes, (start + W2) / 2, middle - 0.24, f"h: {len(neurons)} entries", fontsize=9, color=GREY)


def _moments(axes: Axes, x: float, top: float, rows: int, columns: int) -> None:
    """Two sheets behind a tensor: its Adam moments."""
    for sheet in (2 * SHEET, SHEET):
        place = (x + sheet, top - rows * CELL + sheet), columns * CELL, rows * CELL
        axes.add_patch(Rectangle(*place, facecolor="#f3f4f6", edgecolor="#b6bcc6", linewidth=0.9, zorder=2))


def _compensation(axes: Axes, numbers: float) -> None:
    """The arrow from the removed columns, whose numbers are at a given height, to the next layer's bias."""
    top, low = numbers - 0.17, numbers - 0.62
    left, right = (W2 + (neuron + 0.5) * CELL for neuron in (GONE[0], GONE[-1]))
    middle, target = (left + right) / 2, B2 + 0.5 * CELL
    axes.plot([left, left, right, right], [top, top - 0.1, top - 0.1, top], color=ORANGE, linewidth=1.8)
    arrow(axes, [(middle, top - 0.1), (middle, low), (target, low), (target, numbers + 0.17)], ORANGE, linewidth=2)
    for line, words in enumerate(
        (
            "The average, W₂[:, p] · E[h_p], is added to b₂;",
            "the variation, to the remaining columns,",
            "as far as their neurons express it.",
        )
    ):
        text(axes, W2, low - 0.32 - 0.34 * line, words, fontsize=9, color=ORANGE, ha="left")
