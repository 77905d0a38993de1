"""Fills the tables of a study's page from the files of its trainings.

python -m benchmarks.study FILE --sweep DIR [--beyond DIR] [--latency] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.latency import compare_latencies
from benchmarks.settings import Settings
from benchmarks.table import Table, write_markdown
from kddp_ext.files import write_json
from kddp_ext.workflow import report
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.report import Measured, measure_points


def main() -> int:
    arguments = _parse()
    tables, trainings = [], {}
    for section, path in (("cnn5", arguments.sweep), ("beyond", arguments.beyond)):
        if path is not None:
            measured = _measured(path)
            trainings[section] = {each.point.label: _trainings(each) for each in measured}
            prefix = "" if section == "cnn5" else f"{section}-"
            tables += [_with_title(prefix, table) for table in report.sweep_tables(measured)]
    if arguments.latency:
        tables.append(_latencies(arguments.sweep))
    write_markdown(str(arguments.file), None, tables)
    if arguments.json is not None:
        write_json(arguments.json, trainings)
    return 0


def _measured(path: Path) -> list[Measured]:
    folder = RunFolder(path)
    return measure_points(folder, folder.points(folder.read_config()))


_FIGURES = ("test_accuracy", "width", "active", "parameters", "linear_parameters", "macs")


def _trainings(measured: Measured) -> list[dict[str, Any]]:
    """The figures of each seed, and the width after each epoch for KDDP."""
    trainings = []
    for job, result, epochs in zip(measured.jobs, measured.results, measured.epochs, strict=True):
        widths = [epoch["width"] for epoch in epochs if "width" in epoch]
        kept = {key: result[key] for key in _FIGURES}
        trainings.append({"seed": job.config.seed, **kept, **({"widths": widths} if widths else {})})
    return trainings


_TITLES = {
    "students": "Students: mean ± standard deviation over the seeds",
    "same-width": "KDDP, and KD trained from scratch at the width that KDDP found, with the same seed",
    "ablations": "KDDP with one thing changed",
}


def _with_title(prefix: str, table: report.Table) -> Table:
    return Table(prefix + table.name, _TITLES[table.name], list(table.columns), [list(row) for row in table.rows])


def _latencies(sweep: Path) -> Table:
    """The latencies of the first seed's student of every KD and KDDP point."""
    folder = RunFolder(sweep)
    points = [each for each in _measured(sweep) if each.point.kind in ("kd", "kddp")]
    files = [folder.student(each.jobs[0].name) for each in points]
    measured = compare_latencies(files, (1, 128), Settings(1, 0.5, 9, False, False))
    rows = []
    for point, figures in zip(points, measured, strict=True):
        rows.append([point.point.label, str(point.results[0]["width"]), *_cells(figures)])
    columns = ["student", "hidden width", "PyTorch, 1 image (ms)", "128", "ONNX Runtime, 1 image (ms)", "128"]
    columns += ["safetensors (KiB)", "ONNX (KiB)"]
    return Table("latency", "Latency on one thread, median, and size on disk (first seed)", columns, rows)


def _cells(figures: dict[str, Any]) -> list[str]:
    latency = figures["latency"]
    times = [latency[engine][batch]["ms"] for engine in ("pytorch", "onnxruntime") for batch in ("1", "128")]
    sizes = [figures["file_bytes"], figures["onnx_bytes"]]
    return [*(f"{time:.3f}" for time in times), *(f"{size / 1024:,.0f}" for size in sizes)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the page, with a marker for each table")
    parser.add_argument("--sweep", type=Path, required=True, help="folder of the sweep with cnn5")
    parser.add_argument("--beyond", type=Path, help="folder of the sweep with another student")
    parser.add_argument("--json", type=Path, help="write the figures of every training to this file")
    parser.add_argument("--latency", action="store_true", help="measure latencies; the machine must be quiet")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
