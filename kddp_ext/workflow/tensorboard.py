"""A training's metrics as TensorBoard event files."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from kddp_ext.workflow.errors import WorkflowError


def require_tensorboard() -> None:
    """Raise WorkflowError, naming the option and the extra, if tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise WorkflowError(
            f"--tensorboard: needs the package tensorboard ({error}); pip install 'kddp_ext[tensorboard]'"
        ) from error


def write_events(folder: Path, epochs: list[dict[str, Any]], images: int) -> None:
    """Write the metrics of all finished epochs, as in metrics.jsonl, in place of the event files in `folder`.

    An epoch trains on `images` images. The message of an OSError names the folder.
    """
    from torch.utils.tensorboard import SummaryWriter

    earlier = list(folder.glob("events.*"))
    hook, threading.excepthook = threading.excepthook, lambda _: None  # or the writer's thread prints its error, too
    try:
        with SummaryWriter(str(folder), purge_step=0) as writer:  # readers forget the epochs of earlier files
            for metrics in epochs:
                for tag, value in scalars(metrics, images).items():
                    writer.add_scalar(tag, value, metrics["epoch"])
        for path in earlier:
            path.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror}") from error
    finally:
        threading.excepthook = hook


def scalars(metrics: dict[str, Any], images: int) -> dict[str, float]:
    """The values of one epoch by tag. TensorBoard groups tags by the part before the slash."""
    values = {
        **{f"loss/{term}": metrics[term] for term in ("loss", "kd", "cross_entropy", "l1")},
        "accuracy/train": metrics["train_accuracy"],
        "accuracy/validation": metrics["validation_accuracy"],
        "size/parameters": metrics["parameters"],
        "size/width": metrics.get("width"),
        "speed/images_per_second": images / max(metrics["seconds"]["epoch"], 1e-9),
        **{f"seconds/{phase}": seconds for phase, seconds in metrics["seconds"].items()},
    }
    return {tag: value for tag, value in values.items() if value is not None}
