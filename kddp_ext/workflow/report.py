"""The report of a run or a sweep: its tables, report.md, timing.md and what the terminal shows.

plots.py draws the picture, and html_report.py writes report.html.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from kddp_ext.files import remove_leftovers, write_text
from kddp_ext.workflow.config import SweepConfig
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.folder import RunFolder, locked
from kddp_ext.workflow.html_report import curves_of, write_page
from kddp_ext.workflow.jobs import Job, Point, label_at_found_width
from kddp_ext.workflow.measure import ACTIVE_IMAGES, Confusion
from kddp_ext.workflow.plots import draw

_MEANING = {
    "teacher": "the large network",
    "scratch": "the student trained on the labels alone",
    "kd": "the student trained with the teacher's logits",
    "kddp": "kd with the L1 penalty and dynamic pruning",
    "kd-at-found-width": "kd from scratch at the widths that kddp found",
}
_COLUMNS = (
    "network",
    "seeds",
    "test accuracy (%)",
    "hidden width",
    "active",
    "parameters",
    "in linear layers",
    "MACs",
    "file (KiB)",
    "accuracy against kd (points)",
    "smaller than kd",
)
_ON_TERMINAL = ("network", "test accuracy (%)", "hidden width", "parameters", "MACs", "smaller than kd")
_CLASSES_SHOWN = 20
_PHASES = ("data", "teacher", "student", "loss", "prune", "validation", "epoch")


@dataclass(frozen=True)
class Measured:
    """A point with its finished trainings, at least one, the figures of each, and the metrics of each one's epochs."""

    point: Point
    jobs: tuple[Job, ...]
    results: tuple[dict[str, Any], ...]
    epochs: tuple[list[dict[str, Any]], ...]

    def values(self, key: str) -> list[float]:
        """The figure `key` of each seed."""
        return [float(result[key]) for result in self.results]

    def mean(self, key: str) -> float:
        """The mean of the figure `key` over the seeds."""
        return statistics.fmean(self.values(key))

    def percent(self, key: str) -> str:
        """Mean ± standard deviation of the figure `key` in percent."""
        return percent(self.values(key))

    def by_seed(self, key: str) -> dict[int, float]:
        """The figure `key` by seed."""
        return {job.config.seed: value for job, value in zip(self.jobs, self.values(key), strict=True)}


class Table(NamedTuple):
    """Rows of text. The first column is left-aligned, the others are right-aligned."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """The table in Markdown, without a final line break."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows))


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print one line as it is: no wrapping, colours or markup."""
    console.print(line, style=style, highlight=False, soft_wrap=True, markup=False)


def title_of(info: DatasetInfo) -> str:
    """The title of a run's report."""
    return f"KDDP on {info.name}"


def classes_of(info: DatasetInfo) -> str:
    """Such as "2 classes: cats, dogs"."""
    shown = ", ".join(info.class_names[:_CLASSES_SHOWN])
    return f"{info.classes:,} classes: {shown}{', …' * (info.classes > _CLASSES_SHOWN)}"


def input_of(info: DatasetInfo) -> str:
    """What the networks for a data set expect, in words."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (info.mean, info.std))
    shape = f"(N, {info.channels}, {info.size}, {info.size})"
    return f"float32 {shape}, each channel's values from 0 to 255 minus ({mean}), divided by ({std})"


def measure_points(folder: RunFolder, points: Sequence[Point]) -> list[Measured]:
    """The points that have at least one finished training."""
    measured = []
    for point in points:
        results = {job: result for job in point.jobs if (result := folder.read_result(job.name)) is not None}
        if results:
            epochs = tuple(folder.read_epochs(job.name) for job in results)
            measured.append(Measured(point, tuple(results), tuple(results.values()), epochs))
    return measured


def rebuild_report(path: Path, console: Console) -> None:
    """Write the report again from the finished trainings; raises WorkflowError if a file is missing or damaged."""
    folder = RunFolder(path)
    write_report(folder, folder.read_config(), console)
    say(console, f"The report is {folder.report}")


def write_report(folder: RunFolder, sweep: SweepConfig, console: Console) -> None:
    """Write report.md, report.html, report.png and timing.md, and print the table.

    All but the last depend on the trained weights alone: they are the same, byte for byte, however often a run was
    interrupted. All times are in timing.md.
    """
    measured, info = measure_points(folder, folder.points(sweep)), folder.read_info()
    with locked(folder.path):
        remove_leftovers(folder.path)
        draw(folder.picture, measured, title_of(info))
        write_page(folder.page, title_of(info), _sections(sweep, info, measured))
        write_text(folder.timing, "\n".join(_timing_lines(measured)) + "\n")
        write_text(folder.report, "\n".join(_report_lines(folder, sweep, info, measured)) + "\n")
    print_results(console, info, measured)


def sweep_tables(measured: Sequence[Measured]) -> list[Table]:
    """The tables of a report: all networks; KDDP and KD at equal width; the ablations."""
    kd = _full_kd(measured)
    ablations = [each for each in measured if each.point.kind == "ablation"]
    tables = [Table("students", _COLUMNS, [_row(each, kd) for each in _main(measured)])]
    if pairs := _pairs(measured):
        tables.append(Table("same-width", ("KDDP", "hidden width", "KDDP", "KD", "difference by seed"), pairs))
    if ablations:
        base = [each for each in measured if each.point.is_base]
        tables.append(Table("ablations", _COLUMNS, [_row(each, kd) for each in (*base, *ablations)]))
    return tables


def print_results(console: Console, info: DatasetInfo, measured: Sequence[Measured]) -> None:
    """Print the main columns of the first table, the names of the classes, and the warnings."""
    table = RichTable(title=title_of(info), title_style="bold", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in _ON_TERMINAL:
        first = name == "network"
        table.add_column(name.replace(" ", "\n", 1), justify="left" if first else "right", no_wrap=not first)
    kd = _full_kd(measured)
    for each in _main(measured):
        cells = dict(zip(_COLUMNS, _row(each, kd), strict=True))
        table.add_row(*(cells[name] for name in _ON_TERMINAL), style="bold" if each.point.kind == "kddp" else None)
    console.print(table)
    say(console, classes_of(info))
    for warning in warnings_of(measured):
        say(console, f"warning: {warning}", "yellow")


def warnings_of(measured: Sequence[Measured]) -> list[str]:
    """What the finished trainings warn of, each with the training's name; each training once."""
    return list(
        dict.fromkeys(
            f"{job.name}: {warning}"
            for each in measured
            for job, result in zip(each.jobs, each.results, strict=True)
            for warning in result.get("warnings", ())
        )
    )


def _report_lines(folder: RunFolder, sweep: SweepConfig, info: DatasetInfo, measured: Sequence[Measured]) -> list[str]:
    lines = [f"# {title_of(info)}", "", f"{classes_of(info)}.", ""]
    for warning in warnings_of(measured):
        lines += [f"> **Warning.** {warning}", ""]
    tables = sweep_tables(measured)
    for table in tables:
        lines += [*([f"## {table.name}", ""] if len(tables) > 1 else []), table.to_markdown(), ""]
    lines += [f"- **{kind}**: {meaning}." for kind, meaning in _meanings(measured).items()]
    views = next((each.results[0].get("test_accuracy_with_views") for each in measured if each.point.jobs), None)
    if views is not None:
        lines += ["", f"With several views of each test image the teacher's accuracy is {views:.2%}."]
    return [
        *lines,
        "",
        f"![Accuracy against parameters, widths over the epochs]({folder.picture.name})",
        "",
        *_explanation(sweep, measured),
        "",
        "## Settings",
        "",
        "```",
        *_settings(sweep),
        "```",
    ]


def _meanings(measured: Sequence[Measured]) -> dict[str, str]:
    return {each.point.kind: _MEANING[each.point.kind] for each in measured if each.point.kind in _MEANING}


def _explanation(sweep: SweepConfig, measured: Sequence[Measured]) -> list[str]:
    return [
        f"Test accuracy is measured with the weights of {_epochs(sweep, measured)},",
        "on images that nothing else used; with several seeds it is the mean ± the standard deviation. A neuron of the",
        f"hidden layer is active if it fires for one of {ACTIVE_IMAGES:,} training images. MACs are the multiply-adds",
        "of the convolutions and linear layers for one image. The last two columns compare with KD at the full width:",
        "the difference in percentage points by seed, and how many times fewer parameters. Times are in timing.md.",
    ]


def _settings(sweep: SweepConfig) -> list[str]:
    return [f"{option} = {value}" for option, value in sweep.options().items()]


def _sections(sweep: SweepConfig, info: DatasetInfo, measured: Sequence[Measured]) -> dict[str, list[Any]]:
    """The content of report.html."""
    counted = {
        each.point.label: [result["confusion"] for result in each.results]
        for each in _main(measured)
        if all("confusion" in result for result in each.results)  # results of earlier versions have none
    }
    return {
        "": [f"{classes_of(info)}.", *(f"Warning. {warning}" for warning in warnings_of(measured))],
        **{table.name: [table] for table in sweep_tables(measured)},
        "What the tables show": [
            "; ".join(f"{kind}: {meaning}" for kind, meaning in _meanings(measured).items()) + ".",
            " ".join(_explanation(sweep, measured)),
        ],
        "Curves": curves_of(measured),
        "Accuracy of each class (%)": [class_table(info.class_names, counted)] if counted else [],
        "Settings": [_settings(sweep)],
    }


def class_table(names: Sequence[str], counted: Mapping[str, Sequence[Confusion]]) -> Table:
    """The accuracy of each class in percent, and the most frequent errors of the last network.

    Args:
        names: the names of the classes.
        counted: what each network took the test images for, one list for each seed, by the network's label.
    """
    *_, last = counted
    rows = []
    for index, name in enumerate(names):
        sums = [sum((Counter(each[index]) for each in seeds), Counter[str]()) for seeds in counted.values()]
        images = sums[-1].total()
        wrong = [(count, names[int(key)]) for key, count in sums[-1].most_common() if int(key) != index][:3]
        rows.append(
            [
                name,
                f"{images // len(counted[last]):,}",
                *(f"{100 * each[str(index)] / each.total():.1f}" if images else "" for each in sums),
                ", ".join(f"{other} ({100 * count / images:.1f})" for count, other in wrong),
            ]
        )
    return Table("classes", ("class", "test images", *counted, f"{last}: taken for"), rows)


def _epochs(sweep: SweepConfig, measured: Sequence[Measured]) -> str:
    """Which epoch's weights were measured, and where that differs between the trainings its number for each."""
    student = sweep.run.student
    if student.select == "last" and not student.patience:
        return "the last epoch"
    numbers = dict.fromkeys(
        f"{job.name} {result['epoch']}"
        for each in measured
        for job, result in zip(each.jobs, each.results, strict=True)
        if each.point.kind != "teacher"
    )
    best = "with the best validation accuracy (of the teacher: the last one)"
    return f"the {'last epoch' if student.select == 'last' else f'epoch {best}'}: {', '.join(numbers)}"


def _timing_lines(measured: Sequence[Measured]) -> list[str]:
    """Seconds of each training by phase."""
    rows = {}
    for job, epochs in (pair for each in measured for pair in zip(each.jobs, each.epochs, strict=True)):
        seconds = {phase: sum(epoch["seconds"].get(phase, 0.0) for epoch in epochs) for phase in _PHASES}
        rows[job.name] = [job.name, *(f"{seconds[phase]:.2f}" if seconds[phase] else "" for phase in _PHASES)]
    return ["# Where the time went", "", Table("", ("seconds", *_PHASES[:-1], "all"), [*rows.values()]).to_markdown()]


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation, such as "81.23 ± 0.14"."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _difference(ours: Measured, theirs: Measured) -> str:
    """The difference in accuracy over the seeds that both have, such as "+0.31 ± 0.08"."""
    first, second = ours.by_seed("test_accuracy"), theirs.by_seed("test_accuracy")
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    text = percent(differences) if differences else ""
    return text if text.startswith("-") or not text else f"+{text}"


def _row(measured: Measured, kd: Measured | None) -> list[str]:
    is_teacher = measured.point.kind == "teacher"
    macs = measured.mean("macs") / 1e6
    row = [
        measured.point.label,
        str(len(measured.results)),
        measured.percent("test_accuracy"),
        _width(measured),
        _width(measured, "active"),
        f"{measured.mean('parameters'):,.0f}",
        f"{measured.mean('linear_parameters'):,.0f}",
        f"{macs:.{2 if macs > 1 else 3}f}M",
        "" if is_teacher else f"{measured.mean('bytes') / 1024:,.0f}",
    ]
    if kd is None or is_teacher or measured is kd:
        return [*row, "", ""]
    fewer = kd.mean("parameters") / measured.mean("parameters")
    return [*row, _difference(measured, kd), "" if fewer == 1 else f"{fewer:.2f}x"]


def _main(measured: Sequence[Measured]) -> list[Measured]:
    return [each for each in measured if each.point.kind not in ("kd-at-found-width", "ablation")]


def _full_kd(measured: Sequence[Measured]) -> Measured | None:
    """KD of the student that KDDP starts from."""
    students = [each.jobs[0].config.student for each in measured if each.point.kind in ("scratch", "kddp")]
    found = (each for each in measured if each.point.kind == "kd" and each.jobs[0].config.student in students)
    return next(found, None)


def _width(measured: Measured, key: str = "width") -> str:
    if any(result[key] is None for result in measured.results):
        return ""
    widths = [int(width) for width in measured.values(key)]
    if len(set(widths)) == 1:
        return f"{widths[0]:,}"
    return f"{statistics.fmean(widths):,.0f} ({min(widths):,}–{max(widths):,})"


def _pairs(measured: Sequence[Measured]) -> list[list[str]]:
    """KDDP, and KD at the width that it found."""
    by_label = {each.point.label: each for each in measured}
    rows = []
    for kddp in (each for each in measured if each.point.kind == "kddp"):
        kd = by_label.get(label_at_found_width(kddp.point))
        if kd is not None:
            accuracies = [each.percent("test_accuracy") for each in (kddp, kd)]
            rows.append([kddp.point.label, _width(kddp), *accuracies, _difference(kddp, kd)])
    return rows
