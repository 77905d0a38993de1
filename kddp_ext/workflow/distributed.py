"""The processes that torchrun starts to train one model, and how they communicate.

Every process must call these functions, except `rank`, `count` and `share`, in the same order. A single process
communicates nothing. A process that fails just ends: torchrun then ends the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from kddp_ext.workflow.errors import WorkflowError

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)  # for the others, which may download a data set, before they count as lost


def rank() -> int:
    """The rank of this process. Rank 0 writes files and shows progress."""
    return torch.distributed.get_rank() if _is_joined() else 0


def count() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if _is_joined() else 1


def _is_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def share(rows: Tensor) -> Tensor:
    """This process's part of `rows`: every `count()`-th row."""
    return rows[rank() :: count()]


def total(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes, which have the same shape. Every process gets the same bits."""
    if count() == 1:
        return tensor
    result = tensor.clone()
    torch.distributed.all_reduce(result)
    return result


def average_buffers(model: nn.Module) -> None:
    """Set the floating-point buffers of `model` to their mean over all processes.

    On CPUs, each process normalises by the statistics of its own part of a batch, and its running statistics differ
    from the others'. They must agree before the model is pruned, evaluated or saved.
    """
    for buffer in model.buffers() if count() > 1 else ():
        if buffer.is_floating_point():
            buffer.copy_(total(buffer) / count())


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of the ranks. They are sent as pickles."""
    values: list[Any] = [value] * count()
    if count() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def on_rank_zero(action: Callable[[], T]) -> T:
    """Call `action` on rank 0 and return its result, which is sent as a pickle, on every process."""
    results: list[Any] = [action() if rank() == 0 else None]
    if count() > 1:
        torch.distributed.broadcast_object_list(results)
    return results[0]  # type: ignore[no-any-return]


@contextmanager
def held_on_rank_zero(context: AbstractContextManager[T]) -> Iterator[T]:
    """Enter `context` on rank 0 while every process is inside; yields its value."""
    with ExitStack() as stack:
        yield on_rank_zero(lambda: stack.enter_context(context))


def require_same(what: str, value: object) -> None:
    """Raise WorkflowError on every process unless all have the same `value`."""
    values = gather(value)
    for number, other in enumerate(values):
        if other != values[0]:
            raise WorkflowError(f"{what}: expected the same on all ranks, got {values[0]} and, on {number}, {other}")


@contextmanager
def process_group(*, use_gpus: bool) -> Iterator[None]:
    """Join the processes that torchrun started, if it did. `use_gpus` says whether nccl may be used besides gloo."""
    if not {"RANK", "LOCAL_RANK"} <= os.environ.keys() or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    nccl = use_gpus and torch.cuda.is_available() and torch.distributed.is_nccl_available()
    try:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise WorkflowError(f"the other processes cannot be reached: {_reason(error)}") from error
    try:
        yield
        gather(None)  # waits for all
    except RuntimeError as error:
        # Errors of nccl have a class. Those of gloo are plain RuntimeErrors that name its source files.
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        raise ConnectionError(
            f"another process has ended or cannot be reached ({_reason(error)}). "
            "Finished epochs are kept; start all processes again with --resume"
        ) from error
    torch.distributed.destroy_process_group()


def _reason(error: Exception) -> str:
    """The first sentence of an error of torch.distributed, without its place in the source."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).strip().split("\n", 1)[0]).split(". ", 1)[0]
