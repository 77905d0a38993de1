"""`kddp report`: the report of a run or a sweep, from what lies on disk."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kddp_ext.workflow.config import load_config
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.folder import RunFolder, require_run
from kddp_ext.workflow.report import print_table, write_report
from kddp_ext.workflow.sweep import sweep_points
from kddp_ext.workflow.sweep_config import load_sweep
from kddp_ext.workflow.sweep_report import write_sweep_report
from kddp_ext.workflow.timing import read_timing


def rebuild_report(path: Path, console: Console) -> None:
    """Write report.md and its picture anew, of what is finished by now; nothing is trained or measured.

    Raises:
        WorkflowError: `path` is no run and no sweep, or a file in it is damaged.
    """
    folder = RunFolder(path)
    if folder.sweep.is_file():
        sweep = load_sweep(folder.sweep)
        write_sweep_report(folder, sweep, sweep_points(folder, sweep))
    else:
        config = load_config(require_run(path).config)
        title = f"KDDP on {INFO[config.dataset].name}"
        write_report(folder, config, title)
        print_table(console, folder, title, read_timing(folder))
    console.print(f"The report is {folder.report}", highlight=False, soft_wrap=True)
