"""One training step: from the images to the loss, back through the student, and into the pruner."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shapes import BLUE, GREEN, GREY, INK, ORANGE, PALE, RED, arrow, box, canvas, text


def draw() -> Figure:
    """The whole picture."""
    figure, axes = canvas(13.2, 7.4)
    _networks(axes)
    _loss(axes)
    _forward(axes)
    _gradients(axes)
    _pruning(axes)
    _legend(axes)
    return figure


def _networks(axes: Axes) -> None:
    box(axes, 0.2, 3.55, 1.45, 1.1, "images\nand labels", fill=PALE)
    box(axes, 2.5, 5.55, 4.3, 0.9, "teacher, frozen", BLUE, fontweight="bold")
    box(axes, 2.5, 3.2, 4.3, 1.75, "", GREEN)
    text(axes, 4.65, 4.68, "student", fontweight="bold")
    box(axes, 2.65, 3.35, 1.05, 1.05, "layers\nbefore", GREY, fontsize=9)
    box(axes, 4.05, 3.35, 1.05, 1.05, "hidden\nW₁, b₁", GREEN, fontsize=9)
    box(axes, 5.65, 3.35, 1.05, 1.05, "next\nW₂, b₂", GREY, fontsize=9)
    for start, end in ((3.7, 4.05), (5.1, 5.65)):
        arrow(axes, [(start, 3.88), (end, 3.88)])
    text(axes, 7.85, 6.25, "logits t")
    text(axes, 7.85, 4.33, "logits s")


def _loss(axes: Axes) -> None:
    box(axes, 9.0, 2.15, 3.9, 4.75, "", ORANGE)
    text(axes, 10.95, 6.6, "fused_kd_l1_loss", fontweight="bold", family="monospace")
    for y, name, formula in (
        (5.15, "KD", "alpha · T² · KL(t/T ‖ s/T)"),
        (3.75, "cross entropy", "(1 − alpha) · CE(s, labels)"),
        (2.35, "L1 of activations", "l1_weight · Σ|a| / N"),
    ):
        box(axes, 9.2, y, 3.5, 1.15, "", ORANGE, fill="#fdf3e4")
        text(axes, 10.95, y + 0.77, name, fontweight="bold", fontsize=9.5)
        text(axes, 10.95, y + 0.35, formula, fontsize=9)


def _forward(axes: Axes) -> None:
    arrow(axes, [(1.65, 4.3), (2.07, 4.3), (2.07, 6.0), (2.5, 6.0)])
    arrow(axes, [(1.65, 4.07), (2.5, 4.07)])
    arrow(axes, [(0.92, 4.65), (0.92, 7.15), (10.95, 7.15), (10.95, 6.9)])
    text(axes, 5.0, 6.95, "labels", fontsize=9, color=GREY)
    arrow(axes, [(6.8, 6.0), (9.0, 6.0)])
    arrow(axes, [(6.8, 4.08), (9.0, 4.08)])
    # The hook.
    axes.plot([5.37], [3.88], marker="o", markersize=7, color=ORANGE, zorder=6)
    arrow(axes, [(5.37, 3.88), (5.37, 2.72), (9.0, 2.72)], ORANGE)
    text(axes, 7.2, 2.93, "pruner.activations a", fontsize=9, color=ORANGE)


def _gradients(axes: Axes) -> None:
    arrow(axes, [(9.0, 3.72), (6.8, 3.72)], BLUE, linestyle=(0, (4, 2)))
    text(axes, 7.85, 3.5, "∂loss/∂s", fontsize=9, color=BLUE)
    arrow(axes, [(9.0, 2.4), (5.1, 2.4), (5.1, 3.2)], BLUE, linestyle=(0, (4, 2)))
    text(axes, 7.2, 2.2, "∂loss/∂a", fontsize=9, color=BLUE)


def _pruning(axes: Axes) -> None:
    box(axes, 8.05, 0.7, 4.85, 0.95, "statistics of each neuron\nΣ|a|, Σa, Σa², nonzeros, max|a|", RED, fontsize=9)
    arrow(axes, [(10.95, 2.15), (10.95, 1.65)], RED)
    box(axes, 2.5, 0.7, 4.3, 0.95, "", RED)
    text(axes, 4.65, 1.38, "pruner.prune()", fontweight="bold", family="monospace")
    text(axes, 4.65, 0.98, "at each check: which are inactive?", fontsize=9)
    arrow(axes, [(8.05, 1.17), (6.8, 1.17)], RED)
    arrow(axes, [(3.4, 1.65), (3.4, 3.2)], RED, linewidth=2.4)
    text(axes, 3.28, 2.42, "smaller layers, gradients\nand optimizer state", fontsize=9, color=RED, ha="right")


def _legend(axes: Axes) -> None:
    for x, words, colour, style in (
        (0.3, "forward", INK, "-"),
        (2.6, "gradients, from the same pass", BLUE, (0, (4, 2))),
        (7.1, "pruning", RED, "-"),
    ):
        axes.plot([x, x + 0.6], [0.28, 0.28], color=colour, linestyle=style, linewidth=1.8)
        text(axes, x + 0.75, 0.28, words, fontsize=9, ha="left", color=GREY)
