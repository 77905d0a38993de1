"""The latency of finished students on one thread, in PyTorch and in ONNX Runtime, and their sizes.

python -m benchmarks.students FILE.safetensors... [--batches 1,128] [--rounds N] [--seconds S] [--json FILE]
                              [--markdown FILE] [--smoke]

The students are timed in turns within one process. The ratios compare each of them with the first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.arguments import at_least
from benchmarks.latency import compare_latencies, missing_packages
from benchmarks.settings import Settings
from benchmarks.table import Table, kibibytes, times, write_markdown
from benchmarks.timing import Quartiles
from kddp_ext.files import write_json
from kddp_ext.workflow.errors import WorkflowError

JSON_VERSION = 1
ENGINES = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime"}
RUN_FILES = ("student.safetensors", "checkpoint.pt")  # the names of these files are the same for every stage of a run


def main() -> int:
    """Returns 0, or 2 if a file is not a student file."""
    arguments = _parse()
    settings = Settings(1, arguments.seconds, arguments.rounds, False, arguments.smoke)
    described = machine.describe(settings)
    described["onnxruntime"] = machine.version_of("onnxruntime")
    head = f"{machine.summary(described)}, ONNX Runtime {described['onnxruntime']}"
    console = Console()
    console.print(head)
    try:
        with console.status("measuring"):
            results = compare_latencies(arguments.files, arguments.batches, settings)
    except WorkflowError as error:
        print(error, file=sys.stderr)
        return 2
    tables = [sizes(results), latencies(results)]
    for table in tables:
        console.print(table.for_terminal())
    if arguments.json:
        content = {"version": JSON_VERSION, "machine": described, "batches": arguments.batches, "students": results}
        write_json(arguments.json, content)
    if arguments.markdown:
        write_markdown(arguments.markdown, head, tables, head_name="students-machine")
    return 0


def sizes(results: list[dict[str, Any]]) -> Table:
    """Parameters, MACs and file sizes."""
    columns = ["student", "parameters", "MACs (million)", "student file (KiB)", "ONNX file (KiB)"]
    rows = [
        [
            name,
            f"{result['parameters']:,}",
            f"{result['macs'] / 1e6:.3f}",
            *("" if size is None else kibibytes(size) for size in (result["file_bytes"], result["onnx_bytes"])),
        ]
        for name, result in zip(names([result["path"] for result in results]), results, strict=True)
    ]
    return Table("students-size", "Finished students", columns, rows, "MACs are of one image.")


def latencies(results: list[dict[str, Any]]) -> Table:
    """Milliseconds of a call, and the ratio to the first student."""
    batches = list(results[0]["latency"]["pytorch"])
    columns = ["student"]
    for batch in batches:
        columns += [f"batch {batch} (ms)", "times the first student"]
    rows = []
    for engine, title in ENGINES.items():
        for name, result in zip(names([result["path"] for result in results]), results, strict=True):
            if engine in result["latency"]:
                found = [result["latency"][engine][batch] for batch in batches]
                cells = [(_short(one["ms"]), times(Quartiles(**one["ratio"]))) for one in found]
                rows.append([f"{name}, {title}", *(cell for pair in cells for cell in pair)])
    return Table("students-latency", "Time of a call on one thread, float32", columns, rows, _note(results))


def _note(results: list[dict[str, Any]]) -> str:
    note = "Median over the rounds; in brackets the quartiles of the rounds' ratios."
    missing = missing_packages()
    if missing:
        return f"{note} ONNX Runtime needs missing packages: {', '.join(missing)} (pip install 'kddp_ext[onnx]')."
    largest = max(result["largest_difference"] for result in results)
    return f"{note} ONNX Runtime's logits differ from PyTorch's by at most {largest:.1e}."


def names(paths: list[str]) -> list[str]:
    """Short names for the files, without their common folder and without the file name that all stages share."""
    shortened = [Path(path).parent if Path(path).name in RUN_FILES else Path(path).with_suffix("") for path in paths]
    common = os.path.commonpath([path.absolute().parent for path in shortened])
    return [Path(os.path.relpath(path.absolute(), common)).as_posix() for path in shortened]


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a student file, or the folder of a run")
    parser.add_argument("--batches", type=_numbers, default=[1, 128], help="images in a call (default 1,128)")
    parser.add_argument("--rounds", type=at_least(1), default=9, help="turns of each student (default 9)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of each student in all turns (default 0.5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables to this file, at its markers if any")
    parser.add_argument("--smoke", action="store_true", help="one short turn, to check that everything runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.seconds = 1, 0.001
    return arguments


def _numbers(text: str) -> list[int]:
    return [at_least(1)(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
