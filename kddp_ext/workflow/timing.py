"""Where the time of a run went, and how fast its networks answer: what no two runs have in common.

It has files of its own, so that report.md is the same, byte for byte, however often a run was interrupted.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kddp_ext.files import with_digest, without_digest, write_json, write_text
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.inspect import find_models
from kddp_ext.workflow.job import STAGES
from kddp_ext.workflow.measure import forward_seconds
from kddp_ext.workflow.read_files import read_json
from kddp_ext.workflow.runtime import Runtime

BATCHES = (1, 128)
_PHASES = ("data", "teacher", "student", "loss", "prune", "validation")


def write_timing(folder: RunFolder, image: Tensor, runtime: Runtime, notes: list[str]) -> None:
    """Measure the latency of every finished network of a run, and write timing.json and timing.md.

    Args:
        image: an example, (1, C, S, S), on the device.
        notes: sentences for the report.
    """
    milliseconds = {}
    for saved in find_models(folder.path):
        model = runtime.place(saved.load(image.cpu()))
        seconds = {batch: forward_seconds(model, image, batch) for batch in BATCHES}
        milliseconds[saved.stage] = {str(batch): round(1000 * each, 4) for batch, each in seconds.items()}
    timing = {
        "latency_ms": milliseconds,
        "seconds": {stage: _seconds(folder.read_epochs(stage)) for stage in milliseconds},
        "notes": notes,
    }
    write_text(folder.timing_report, "\n".join(_lines(timing)) + "\n")
    write_json(folder.timing, with_digest(timing))  # last: it marks the measurement as done


def read_timing(folder: RunFolder) -> dict[str, Any]:
    """What `write_timing` measured; empty before that.

    Raises:
        WorkflowError: the file is damaged.
    """
    if not folder.timing.is_file():
        return {}
    try:
        timing = read_json(folder.timing, "JSON")
        if not isinstance(timing, dict):
            raise ValueError("expected a JSON object")
        return without_digest(timing)
    except ValueError as error:
        raise WorkflowError(f"{folder.timing} is damaged: {error}. Delete it to measure anew.") from error


def _seconds(epochs: list[dict[str, Any]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for epoch in epochs:
        for phase, value in epoch["seconds"].items():
            seconds[phase] = round(seconds.get(phase, 0.0) + value, 3)
    return seconds


def _lines(timing: dict[str, Any]) -> list[str]:
    stages = [stage for stage in STAGES if stage in timing["latency_ms"]]
    lines = ["# Where the time went", "", f"| seconds | {' | '.join(_PHASES)} | whole |"]
    lines.append(f"|---|{'---:|' * (len(_PHASES) + 1)}")
    for stage in stages:
        seconds = timing["seconds"][stage]
        cells = [f"{seconds[phase]:.2f}" if phase in seconds else "" for phase in _PHASES]
        lines.append(f"| {stage} | {' | '.join(cells)} | {seconds['epoch']:.2f} |")
    lines += ["", *(f"{note}." for note in timing["notes"]), "", "# Latency", ""]
    lines += [f"| stage | {' | '.join(f'{batch} images (ms)' for batch in BATCHES)} |", "|---|---:|---:|"]
    for stage in stages:
        cells = [f"{timing['latency_ms'][stage][str(batch)]:.3f}" for batch in BATCHES]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "The median of a float32 forward pass, on one thread where it is a processor's, on the machine that trained.",
    ]
