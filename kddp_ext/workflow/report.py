"""The table of a run, on the terminal and in report.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kddp_ext.files import write_text
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.job import STAGES, Stage
from kddp_ext.workflow.plots import PICTURE, draw

_MEANING = {
    "teacher": "the large network",
    "scratch": "the student alone, on the labels",
    "kd": "the student under the teacher's guidance, at full width",
    "kddp": "the same, with the L1 penalty and dynamic pruning",
}
# A line break where the terminal's narrower table has one.
_COLUMNS = (
    "stage",
    "test\naccuracy",
    "parameters",
    "hidden\nwidth",
    "MACs",
    "against\nKD",
)
_TIMING_COLUMNS = ("1 image\n(ms)", "128\n(ms)", "time\n(s)")


@dataclass(frozen=True)
class Results:
    """The finished stages of a run.

    Attributes:
        stages: the figures of each stage.
        epochs: the metrics of each epoch of each stage.
    """

    stages: dict[Stage, dict[str, Any]]
    epochs: dict[Stage, list[dict[str, Any]]]


def read_results(folder: RunFolder) -> Results:
    """What the finished stages of a run left on disk."""
    stages = {stage: result for stage in STAGES if (result := folder.read_result(stage)) is not None}
    return Results(stages, {stage: folder.read_epochs(stage) for stage in stages})


def write_report(folder: RunFolder, config: RunConfig, title: str) -> None:
    """Write report.md and its picture. Both are functions of the weights: they hold no time."""
    results = read_results(folder)
    draw(folder.path / PICTURE, results.stages, results.epochs, title)
    columns = [column.replace("\n", " ") for column in _COLUMNS]
    lines = [
        f"# {title}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---' if column == 'stage' else '---:' for column in columns)}|",
        *(f"| {' | '.join(row)} |" for row in _rows(results)),
        "",
        *(f"- **{stage}**: {_meaning(stage, result)}." for stage, result in results.stages.items()),
        "",
        f"![Accuracy against parameters, width and loss over the epochs]({PICTURE})",
        "",
        "Accuracy is that of the last epoch's weights on the test images, which nothing else used. MACs are",
        "the multiply-adds of the convolutions and linear layers for one image. Against KD: how many times",
        "fewer parameters. What was measured with a clock is in timing.md.",
        "",
        *settings_section(config),
    ]
    write_text(folder.report, "\n".join(lines) + "\n")


def print_table(console: Console, folder: RunFolder, title: str, timing: dict[str, Any]) -> None:
    """Print the table of a run, with what `timing` (see timing.py) holds of it."""
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in (*_COLUMNS, *(_TIMING_COLUMNS if timing else ())):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for row in _rows(read_results(folder)):
        times = _times(row[0], timing) if timing else []
        table.add_row(*row, *times, style="bold" if row[0] == "kddp" else None)
    console.print(table)


def _meaning(stage: Stage, result: dict[str, Any]) -> str:
    if "test_accuracy_with_views" not in result:
        return _MEANING[stage]
    return f"{_MEANING[stage]}; {result['test_accuracy_with_views']:.2%} with six views of each test image"


def _rows(results: Results) -> list[list[str]]:
    kd = results.stages.get("kd")
    return [_row(stage, result, kd) for stage, result in results.stages.items()]


def _row(stage: Stage, result: dict[str, Any], kd: dict[str, Any] | None) -> list[str]:
    student = stage != "teacher" and kd is not None
    return [
        stage,
        f"{result['test_accuracy']:.2%}",
        f"{result['parameters']:,}",
        "" if result["width"] is None else f"{result['width']:,}",
        _millions(result["macs"]),
        f"{kd['parameters'] / result['parameters']:.2f}x" if student and kd is not None else "",
    ]


def _times(stage: str, timing: dict[str, Any]) -> list[str]:
    latency, seconds = timing["latency_ms"][stage], timing["seconds"][stage]
    return [f"{latency['1']:.3f}", f"{latency['128']:.2f}", f"{seconds['epoch']:.0f}"]


def _millions(number: int) -> str:
    return f"{number / 1e6:.3f}M" if number < 1e6 else f"{number / 1e6:.2f}M"


def settings_section(config: RunConfig) -> list[str]:
    """The lines of a report that list every setting."""
    settings = (f"{option} = {value}" for option, value in config.options().items())
    return ["## Settings", "", "```", *settings, "```"]
