"""The metrics of a training as TensorBoard's event files."""

from __future__ import annotations

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
    """
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=0)

    def write(metrics: dict[str, Any]) -> None:
        for tag, value in scalars(metrics, images).items():
            writer.add_scalar(tag, value, metrics["epoch"])
        writer.flush()

    try:
        for metrics in epochs:
            write(metrics)
        yield write
    finally:
        writer.close()


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
