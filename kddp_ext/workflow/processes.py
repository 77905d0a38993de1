"""Several processes that train one model: what they tell each other, and how they end together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from kddp_ext.workflow.errors import LostProcessError, SharedError, WorkflowError, message_of

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Processes:
    """This process among those of a run. Where there is one, nothing is communicated.

    What says "all" is called by every process, in the same order.

    Args:
        rank: which of them this is, 0 to count - 1.
        count: how many there are; several have joined torch.distributed's default group before.
        local_rank: which of those on this machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows: every `count`-th."""
        return rows[self.rank :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, the same bits on each."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    def stack(self, tensor: Tensor) -> Tensor:
        """All processes' tensors of one shape, (count, ...), in the order of the ranks."""
        if self.count == 1:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.count)]
        torch.distributed.all_gather(rows, tensor.contiguous())
        return torch.stack(rows)

    def gather(self, value: T) -> list[T]:
        """All processes' values, which can be pickled, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all have come here."""
        self.gather(None)

    def all(self, condition: bool) -> bool:
        """Whether it holds on all of them."""
        return all(self.gather(condition))

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns here, once it has succeeded on all.

        Raises:
            SharedError: (a WorkflowError) it raised a WorkflowError or an OSError on some process. All raise the
                same, with the message of the first that failed; where others did not fail likewise, its rank too.
            RuntimeError: any other exception of an action, on all.
            Exception: where there is one process, whatever the action raises.
        """
        if self.count == 1:
            return action()
        result, failure = [], None
        try:
            result.append(action())
        except Exception as error:
            failure = error
        self._raise_together(failure)
        return result[0]

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first process, which alone calls it; all get a copy. Raises as `together`."""
        return self.gather(self.together(lambda: action() if self.is_first else None))[0]  # type: ignore[return-value]

    def machine_by_machine(self, action: Callable[[], T]) -> T:
        """What `action` returns here; the first process of each machine calls it before the others do.

        For what leaves a file for the others, such as a download. Raises as `together`.
        """
        leads = self.local_rank == 0
        before = self.together(lambda: [action()] if leads else [])
        return self.together(lambda: before[0] if leads else action())

    @contextmanager
    def first_holds(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter `context` on the first process, for all. Raises as `together`."""
        with ExitStack() as stack:

            def enter() -> None:
                if self.is_first:
                    stack.enter_context(context)

            self.together(enter)
            yield

    def require_same(self, what: str, value: object) -> None:
        """Raise WorkflowError, on all alike, where a process has another value than the first."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise SharedError(f"rank {rank}: expected {what} of rank 0, {values[0]}, got {other}")

    def _raise_together(self, failure: Exception | None) -> None:
        mendable = isinstance(failure, (WorkflowError, OSError))
        told = None if failure is None else message_of(failure) if mendable else f"{type(failure).__name__}: {failure}"
        answers = self.gather((told, mendable))
        failed = [(rank, told, mendable) for rank, (told, mendable) in enumerate(answers) if told is not None]
        if not failed:
            return
        rank, message, _ = failed[0]
        if len({told for told, _ in answers}) > 1:
            message = f"rank {rank}: {message}"
        raise (SharedError if all(mendable for *_, mendable in failed) else RuntimeError)(message) from failure


def _is_lost(error: RuntimeError) -> bool:
    # The errors of nccl have a class; those of gloo have none, and name its source files.
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def _reason(error: Exception) -> str:
    """What an error says after its place in the source, without the advice."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).strip().split("\n", 1)[0]).split(". ", 1)[0]


@contextmanager
def joined(
    *, use_gpus: bool, tell: Callable[[str], None], timeout: timedelta = timedelta(minutes=30)
) -> Iterator[Processes]:
    """Join the processes that torchrun started, for as long as the context lasts; without torchrun, this one alone.

    Args:
        use_gpus: whether nccl is wanted beside gloo, where there are GPUs.
        tell: shows the message of an error that all have agreed upon; called on the first process alone, and before
            any ends, since torchrun ends the others as soon as one has.
        timeout: how long a process waits for the others before it takes them for lost. The default is torch's own: one
            that downloads a data set, for all of its machine, may keep the others waiting.

    Raises:
        WorkflowError: the other processes cannot be reached, or no longer (LostProcessError).
    """
    if not all(name in os.environ for name in _ENVIRONMENT) or os.environ["WORLD_SIZE"] == "1":
        yield Processes()
        return
    rank, count, local_rank = (int(os.environ[name]) for name in _ENVIRONMENT)
    nccl = use_gpus and torch.cuda.is_available() and torch.distributed.is_nccl_available()
    try:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timeout)
    except (ValueError, RuntimeError) as error:
        raise WorkflowError(f"rank {rank} of {count}: the others cannot be reached: {_reason(error)}") from error
    processes = Processes(rank, count, local_rank)
    try:
        yield processes
        processes.barrier()
    except SharedError as error:
        if processes.is_first:
            tell(str(error))
        processes.barrier()
        raise
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise LostProcessError(
            f"rank {rank}: another process has ended or cannot be reached ({_reason(error)}). "
            "What is done is kept; start all of them again with --resume"
        ) from error
    torch.distributed.destroy_process_group()
