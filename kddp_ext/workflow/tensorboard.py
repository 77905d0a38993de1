"""A training's metrics as TensorBoard event files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kddp_ext.workflow.errors import WorkflowError


@contextmanager
def event_files(folder: Path, epochs: list[dict[str, Any]], images: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds the metrics of an epoch, as in metrics.jsonl, to the event files in `folder`.

    Finished epochs are written first, and readers discard the same epochs of earlier files. So after a resume
    every epoch is there exactly once, even if only the resumed run was asked for event files.

    Args:
        folder: made if it does not exist; the message of an OSError names it.
        epochs: the metrics of the finished epochs.
        images: number of images that an epoch trains on.
    """
    from torch.utils.tensorboard import SummaryWriter

    with _naming(folder):
        writer = SummaryWriter(str(folder), purge_step=0)

    def write(metrics: dict[str, Any]) -> None:
        with _naming(folder):
            for tag, value in scalars(metrics, images).items():
                writer.add_scalar(tag, value, metrics["epoch"])
            writer.flush()

    try:
        for metrics in epochs:
            write(metrics)
        yield write
    finally:
        with _naming(folder):
            writer.close()


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Make the writer's errors name the folder, and keep its thread from printing the error as well."""
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror}") from error
    finally:
        threading.excepthook = hook


def require_tensorboard() -> None:
    """Raise WorkflowError, naming the option and the extra, if tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise WorkflowError(
            f"--tensorboard: needs the package tensorboard ({error}); pip install 'kddp_ext[tensorboard]'"
        ) from error


def scalars(metrics: dict[str, Any], images: int) -> dict[str, float]:
    """The values of one epoch by tag. TensorBoard groups tags by the part before the slash."""
    values = {
        **{f"loss/{term}": metrics[term] for term in ("loss", "kd", "cross_entropy", "l1")},
        "accuracy/train": metrics["train_accuracy"],
        "size/parameters": metrics["parameters"],
        "speed/images_per_second": images / max(metrics["seconds"]["epoch"], 1e-9),
        **{f"seconds/{phase}": seconds for phase, seconds in metrics["seconds"].items()},
    }
    if metrics["validation_accuracy"] is not None:
        values["accuracy/validation"] = metrics["validation_accuracy"]
    if "width" in metrics:
        values["size/width"] = metrics["width"]
    return values
