"""report.html: tables, and curves whose values show under the pointer, in one file that opens without a network.

Bokeh draws the curves; its script, about a megabyte, is part of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, NoOverlap, NumeralTickFormatter
from bokeh.palettes import Category10_10
from bokeh.plotting import figure
from bokeh.resources import Resources

from kddp_ext.files import write_text
from kddp_ext.workflow.plots import STYLES

if TYPE_CHECKING:
    from kddp_ext.workflow.report import Measured

Epochs = Sequence[Mapping[str, Any]]  # the metrics of each epoch
_MARKERS = {"s": "square", "o": "circle", "D": "diamond", "*": "star"}  # of matplotlib and of Bokeh
_MOST_IN_LEGEND = 8
_OF_AN_EPOCH = {
    "loss": "Loss",
    "kd": "Distillation term, before its weight",
    "cross_entropy": "Cross entropy, before its weight",
    "l1": "L1 of the activations, before its weight",
    "train_accuracy": "Accuracy on training images, 0 to 1",
    "validation_accuracy": "Accuracy on validation images, 0 to 1",
}
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2, p {{ overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }}
.plots > div {{ min-width: 0; }}
table {{ border-collapse: collapse; font-size: 14px; }}
th, td {{ padding: 0.25rem 0.6rem; border-bottom: 1px solid #e6e8eb; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ background: #f6f7f9; padding: 0.8rem; overflow-x: auto; font-size: 13px; }}
</style>
{script}
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_page(path: Path, title: str, sections: Mapping[str, Sequence[Any]]) -> None:
    """Write a page of sections by heading, whose parts are paragraphs, lists of lines, tables and figures of Bokeh.

    All text is escaped. The same content gives the same bytes.
    """
    ids: dict[str, str] = {}
    body = []
    for heading, parts in sections.items():
        if heading and parts:
            body.append(f"<h2>{escape(heading)}</h2>")
        plots = [_plot_html(part, ids) for part in parts if isinstance(part, figure)]
        body += [_html(part) for part in parts if not isinstance(part, figure)]
        body += [f'<div class="plots">\n{"".join(plots)}</div>'] if plots else []
    script = Resources(mode="inline", components=["bokeh"]).render()
    write_text(path, _PAGE.format(title=escape(title), script=script, body="\n".join(body)))


def _html(part: Any) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, list):
        return f"<pre>{escape(chr(10).join(part))}</pre>"
    head, *rows = (
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        for tag, cells in (("th", part.columns), *(("td", row) for row in part.rows))
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _plot_html(plot: Any, ids: dict[str, str]) -> str:
    target = f"plot-{len(ids)}"
    item = {**_renamed(json_item(plot), ids), "target_id": target}
    text = json.dumps(item).replace("<", "\\u003c")  # a name may contain "</script>"
    return f'<div id="{target}"></div>\n<script>Bokeh.embed.embed_item({text})</script>\n'


def _renamed(value: Any, ids: dict[str, str]) -> Any:
    """`value` with ids that count within the page. Bokeh's own count within the process."""
    if isinstance(value, dict):
        return {
            key: ids.setdefault(item, f"m{len(ids)}") if key in ("id", "root_id") else _renamed(item, ids)
            for key, item in value.items()
        }
    return [_renamed(item, ids) for item in value] if isinstance(value, list) else value


def curves_of(measured: Sequence[Measured]) -> list[Any]:
    """Accuracy against size, widths and the metrics of the epochs; of several seeds the curves show the first."""
    shown = [each for each in measured if each.point.kind != "kd-at-found-width"]
    trainings = {each.point.label: each.epochs[0] for each in shown}
    return [_accuracies(measured), *curves_of_epochs(trainings)]


def curves_of_epochs(trainings: Mapping[str, Epochs]) -> list[Any]:
    """The width of each layer, the terms of the loss and the accuracies over the epochs, by the training's name."""
    widths: dict[str, list[tuple[int, float | None]]] = {}
    for name, epochs in trainings.items():
        for epoch in (epoch for epoch in epochs if "width" in epoch):
            for layer, width in epoch.get("widths", {"pruned layers": epoch["width"]}).items():
                widths.setdefault(f"{name}: {layer}", []).append((epoch["epoch"], width))
    plots = [_curves("Neurons of each pruned layer", widths, list(widths))] if widths else []
    for key, title in _OF_AN_EPOCH.items():
        lines = {name: [(epoch["epoch"], epoch.get(key)) for epoch in epochs] for name, epochs in trainings.items()}
        lines = {name: points for name, points in lines.items() if any(value for _, value in points)}
        plots += [_curves(title, lines, list(trainings))] if lines else []
    return plots


def _curves(title: str, lines: Mapping[str, Sequence[tuple[int, float | None]]], names: Sequence[str]) -> Any:
    """Lines by name; the place in `names` decides about the colour, so that it is the same in several plots."""
    plot = _plot(title, "epoch", {"": "@name", "epoch": "@x", "value": "@y"})
    for name, points in lines.items():
        x, y = ([point[axis] for point in points] for axis in (0, 1))
        style = {
            "source": ColumnDataSource({"x": x, "y": y, "name": [name] * len(x)}),
            "color": Category10_10[names.index(name) % 10],
        }
        style |= {"legend_label": name} if len(lines) <= _MOST_IN_LEGEND else {}
        plot.line("x", "y", line_width=2, **style)
        plot.scatter("x", "y", size=5, name="shown", **style)
    return _with_legend(plot)


def _accuracies(measured: Sequence[Measured]) -> Any:
    shown = {
        "": "@name",
        "test accuracy (%)": "@spread",
        "parameters": "@x{0,0}",
        "MACs": "@macs{0,0}",
        "seeds": "@seeds",
    }
    plot = _plot("Test accuracy (%) against size", "parameters (log scale)", shown, x_axis_type="log")
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    for kind, (label, color, marker, _) in STYLES.items():
        found = [each for each in measured if each.point.kind == kind]
        values = {
            "x": [each.mean("parameters") for each in found],
            "y": [100 * each.mean("test_accuracy") for each in found],
            "name": [each.point.label for each in found],
            "spread": [each.percent("test_accuracy") for each in found],
            "macs": [each.mean("macs") for each in found],
            "seeds": [len(each.results) for each in found],
        }
        if found:
            style = {"color": color, "marker": _MARKERS[marker], "size": 12, "fill_alpha": 0.3, "legend_label": label}
            plot.scatter("x", "y", source=ColumnDataSource(values), name="shown", **style)
    return _with_legend(plot)


def _plot(title: str, x_label: str, tooltips: Mapping[str, str], **options: Any) -> Any:
    plot: Any = figure(
        title=title, x_axis_label=x_label, height=320, sizing_mode="stretch_width", tools="box_zoom,reset", **options
    )
    plot.add_tools(HoverTool(tooltips=list(tooltips.items()), name="hover"))
    plot.toolbar.logo = None
    plot.x_range.range_padding = plot.y_range.range_padding = 0.12
    plot.xaxis.major_label_policy = NoOverlap(min_distance=8)
    return plot


def _with_legend(plot: Any) -> Any:
    """Put the legend below the plot, where a click hides a curve; only points show their values."""
    plot.select_one({"name": "hover"}).renderers = [each for each in plot.renderers if each.name == "shown"]
    if plot.legend:
        plot.add_layout(plot.legend[0], "below")
        plot.legend.update(click_policy="hide", ncols=2, orientation="horizontal", border_line_color=None)
    return plot
