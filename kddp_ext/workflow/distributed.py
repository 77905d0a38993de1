"""The processes that torchrun starts to train one model, and how they communicate."""

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

from kddp_ext.workflow.errors import LostProcessError, WorkflowError

T = TypeVar("T")


class Processes:
    """This process among the `count` of a run. Several must have joined torch.distributed's default group.

    Every process must call all methods except `share`, in the same order. A single process communicates nothing.
    `local_rank` is the rank of this process among those of its machine. A process that fails just ends: torchrun then
    ends the others.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of `rows`: every `count`-th row."""
        return rows[self.rank :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, which have the same shape. Every process gets the same bits."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    def average_buffers(self, model: nn.Module) -> None:
        """Set the floating-point buffers of `model` to their mean over all processes.

        On CPUs, each process normalises by the statistics of its own part of a batch, and its running statistics differ
        from the others'. They must agree before the model is pruned, evaluated or saved.
        """
        for buffer in model.buffers() if self.count > 1 else ():
            if buffer.is_floating_point():
                buffer.copy_(self.sum(buffer) / self.count)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of the ranks. They are sent as pickles."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Call `action` on rank 0 and return its result, which is sent as a pickle, on every process."""
        results: list[Any] = [action() if self.is_first else None]
        if self.count > 1:
            torch.distributed.broadcast_object_list(results)
        return results[0]  # type: ignore[no-any-return]

    @contextmanager
    def held_on_rank_zero(self, context: AbstractContextManager[T]) -> Iterator[T]:
        """Enter `context` on rank 0 while every process is inside; yields its value."""
        with ExitStack() as stack:
            yield self.on_rank_zero(lambda: stack.enter_context(context))

    def require_same(self, what: str, value: object) -> None:
        """Raise WorkflowError on every process unless all have the same `value`."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise WorkflowError(f"{what}: expected the same on all ranks, got {values[0]} and, on {rank}, {other}")


@contextmanager
def process_group(*, use_gpus: bool, timeout: timedelta = timedelta(minutes=30)) -> Iterator[Processes]:
    """Join the processes that torchrun started. Without torchrun, yields this process alone.

    Args:
        use_gpus: whether to use nccl besides gloo, if there are GPUs.
        timeout: how long a process waits for the others, which may download a data set, before they count as lost.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        yield Processes()
        return
    nccl = use_gpus and torch.cuda.is_available() and torch.distributed.is_nccl_available()
    try:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timeout)
    except (ValueError, RuntimeError) as error:
        raise WorkflowError(f"the other processes cannot be reached: {_reason(error)}") from error
    processes = Processes(*(int(os.environ[name]) for name in names))
    try:
        yield processes
        processes.gather(None)  # waits for all
    except RuntimeError as error:
        # Errors of nccl have a class. Those of gloo are plain RuntimeErrors that name its source files.
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        raise LostProcessError(
            f"another process has ended or cannot be reached ({_reason(error)}). "
            "Finished epochs are kept; start all processes again with --resume"
        ) from error
    torch.distributed.destroy_process_group()


def _reason(error: Exception) -> str:
    """The first sentence of an error of torch.distributed, without its place in the source."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).strip().split("\n", 1)[0]).split(". ", 1)[0]
