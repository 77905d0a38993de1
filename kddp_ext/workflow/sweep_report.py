"""The tables of a sweep: every point's accuracy, mean and standard deviation over the seeds, beside its size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kddp_ext.files import remove_leftovers, write_text
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.folder import RunFolder, locked
from kddp_ext.workflow.measure import ACTIVE_IMAGES
from kddp_ext.workflow.report import settings_section
from kddp_ext.workflow.sweep_config import TEACHER, Point, SweepConfig
from kddp_ext.workflow.sweep_plots import PICTURE, draw_sweep
from kddp_ext.workflow.sweep_results import Measured, measure_points


@dataclass(frozen=True)
class Table:
    """Rows of finished text; the first column is left-aligned, the others right."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """The table in Markdown, without a line break at its end."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows))


_COLUMNS = (
    "student",
    "seeds",
    "test accuracy",
    "hidden width",
    "of it active",
    "parameters",
    "in linear layers",
    "MACs",
    "file (KiB)",
    "accuracy against KD's",
    "fewer in linear layers",
)


def sweep_tables(measured: Sequence[Measured]) -> list[Table]:
    """The tables of a report: the students; KDDP beside KD of the same width; the ablations."""
    main = [each for each in measured if each.point.kind in ("scratch", "kd", "kddp")]
    ablations = [each for each in measured if each.point.kind == "ablation"]
    kd = _full_kd(measured)
    tables = [Table("students", _COLUMNS, [_row(each, kd) for each in main])]
    if pairs := _pairs(measured):
        columns = ("KDDP", "hidden width", "KDDP's accuracy", "KD's at that width", "difference, seed by seed")
        tables.append(Table("same-width", columns, pairs))
    if ablations:
        base = [each for each in measured if each.point.is_base]
        tables.append(Table("ablations", _COLUMNS, [_row(each, kd) for each in (*base, *ablations)]))
    return tables


def write_sweep_report(folder: RunFolder, sweep: SweepConfig, points: Sequence[Point]) -> None:
    """Write report.md and its picture, from whatever is finished; one process after the other."""
    measured = measure_points(folder, points)
    title = f"KDDP on {INFO[sweep.run.dataset].name}: a sweep"
    with locked(folder.path, wait=True):
        remove_leftovers(folder.path)
        draw_sweep(folder.path / PICTURE, measured, title)
        write_text(folder.report, "\n".join(_report_lines(folder, sweep, measured, title)) + "\n")


def _report_lines(folder: RunFolder, sweep: SweepConfig, measured: Sequence[Measured], title: str) -> list[str]:
    lines = [f"# {title}", ""]
    if (teacher := folder.read_result(TEACHER)) is not None:
        with_views = teacher.get("test_accuracy_with_views")
        also = "" if with_views is None else f" ({with_views:.2%} with six views of each)"
        accuracy = f"{teacher['test_accuracy']:.2%} of the test images{also}"
        lines += [f"The teacher: {accuracy}, {teacher['parameters']:,} parameters.", ""]
    for table in sweep_tables(measured):
        lines += [f"## {table.name}", "", table.to_markdown(), ""]
    lines += [
        f"![Accuracy against parameters, widths over the epochs, ablations]({PICTURE})",
        "",
        "Accuracy is that of the last epoch's weights on the test images, mean ± standard deviation over the seeds.",
        f"A hidden neuron is active that fires for at least one of {ACTIVE_IMAGES} training images.",
        "Against KD's: points above that of KD at the full width, seed by seed; how many times fewer parameters.",
        "",
        *settings_section(sweep.run),
    ]
    return lines


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation, as "81.23 ± 0.14"."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _row(measured: Measured, kd: Measured | None) -> list[str]:
    return [
        measured.point.label,
        str(len(measured.results)),
        percent(measured.values("test_accuracy")),
        _width(measured),
        _width(measured, "active"),
        f"{measured.mean('parameters'):,.0f}",
        f"{measured.mean('linear_parameters'):,.0f}",
        f"{measured.mean('macs') / 1e6:.2f}M",
        f"{measured.mean('bytes') / 1024:,.0f}",
        *(("", "") if kd is None else _against(measured, kd)),
    ]


def _full_kd(measured: Sequence[Measured]) -> Measured | None:
    """KD of the student that KDDP starts from: what the others are compared with."""
    students = [each.jobs[0].config.student for each in measured if each.point.kind in ("scratch", "kddp")]
    found = (each for each in measured if each.point.kind == "kd" and each.jobs[0].config.student in students)
    return next(found, None)


def _against(measured: Measured, kd: Measured) -> tuple[str, str]:
    """How many points more accurate, over the seeds that both have, and how many times smaller."""
    if measured is kd:
        return "", ""
    of_kd = dict(zip((job.config.seed for job in kd.jobs), kd.values("test_accuracy"), strict=True))
    seeds = (job.config.seed for job in measured.jobs)
    accuracies = zip(seeds, measured.values("test_accuracy"), strict=True)
    differences = [accuracy - of_kd[seed] for seed, accuracy in accuracies if seed in of_kd]
    fewer = kd.mean("linear_parameters") / measured.mean("linear_parameters")
    return percent(differences) if differences else "", f"{fewer:.1f}x"


def _width(measured: Measured, key: str = "width") -> str:
    if any(result[key] is None for result in measured.results):
        return ""
    widths = [int(width) for width in measured.values(key)]
    if len(set(widths)) == 1:
        return f"{widths[0]:,}"
    return f"{statistics.fmean(widths):,.0f} ({min(widths):,}–{max(widths):,})"


def _pairs(measured: Sequence[Measured]) -> list[list[str]]:
    """KDDP and KD at the width it found, seed by seed."""
    kd = {
        (result["width"], job.config.seed): result["test_accuracy"]
        for each in measured
        if each.point.kind in ("kd", "kd-at-found-width")
        for job, result in zip(each.jobs, each.results, strict=True)
    }
    rows = []
    for each in measured:
        if each.point.kind != "kddp":
            continue
        pairs = [
            (result["test_accuracy"], kd[(result["width"], job.config.seed)])
            for job, result in zip(each.jobs, each.results, strict=True)
            if (result["width"], job.config.seed) in kd
        ]
        if pairs:
            ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
            differences = [one - other for one, other in pairs]
            rows.append([each.point.label, _width(each), percent(ours), percent(theirs), percent(differences)])
    return rows
