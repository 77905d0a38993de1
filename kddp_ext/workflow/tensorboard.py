"""The metrics of a training as TensorBoard's event files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kddp_ext.workflow.errors import WorkflowError

Write = Callable[[dict[str, Any]], None]


@contextmanager
def event_files(folder: Path, epochs: list[dict[str, Any]], images: int) -> Iterator[Write]:
    """A function that adds the metrics of an epoch, as it is in metrics.jsonl, to the event files in `folder`.

    The epochs that are done already are written first, and readers are told to forget what former files say of
    them. So none is there twice after a run was resumed, and none is missing where only the resumed run was asked
    for event files.

    Args:
        folder: made when it is not there.
        epochs: the metrics of the epochs that are done.
        images: how many an epoch trains on.

    Raises:
        WorkflowError: tensorboard is not installed.
        OSError: the files cannot be written.
    """
    require_tensorboard()
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
    """Have the writer's errors name the folder. It raises here what its thread met, which would print it besides."""
    hook, threading.excepthook = threading.excepthook, _say_nothing
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror}") from error
    finally:
        threading.excepthook = hook


def _say_nothing(_arguments: threading.ExceptHookArgs) -> None:
    pass


def require_tensorboard() -> None:
    """Raise WorkflowError, naming the option and the extra, where tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise WorkflowError(
            f"--tensorboard: needs the package tensorboard ({error}); pip install 'kddp_ext[tensorboard]'"
        ) from error


def scalars(metrics: dict[str, Any], images: int) -> dict[str, float]:
    """The curves of one epoch by their tags; TensorBoard shows what is before the slash as a group.

    Args:
        metrics: as in metrics.jsonl.
        images: how many the epoch trained on.
    """
    values = {
        "loss/loss": metrics["loss"],
        "loss/kd": metrics["kd"],
        "loss/cross_entropy": metrics["cross_entropy"],
        "loss/l1": metrics["l1"],
        "accuracy/train": metrics["train_accuracy"],
        "size/parameters": metrics["parameters"],
        "speed/images_per_second": images / max(metrics["seconds"]["epoch"], 1e-9),
    }
    if metrics["validation_accuracy"] is not None:
        values["accuracy/validation"] = metrics["validation_accuracy"]
    if "width" in metrics:
        values["size/width"] = metrics["width"]
    return values | {f"seconds/{phase}": seconds for phase, seconds in metrics["seconds"].items()}
