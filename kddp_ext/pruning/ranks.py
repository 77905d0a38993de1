"""Several processes that prune alike: each has a share of the samples, and all come to the same decision.

A check has three exchanges: what each rank observed, what it is going to remove, and whether it has done so. At
each, an error of one rank is an error of all, so that none waits for another and none changes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.observation import LayerObservation
from kddp_ext.pruning.records import observed_record, planned_record
from kddp_ext.pruning.selection import LayerDecision
from kddp_ext.pruning.settings import PruningSettings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Ranks:
    """The processes of a group that prune together.

    Args:
        group: torch.distributed's group; None where this process prunes by itself.
        caller: the method that asks, for the messages.
    """

    def __init__(self, group: ProcessGroup | None, *, caller: str) -> None:
        self._group, self._caller = group, caller
        self.size = 1 if group is None else torch.distributed.get_world_size(group)

    @classmethod
    def of(cls, group: ProcessGroup | Literal[False] | None, around: Sequence[Any], *, caller: str) -> Ranks:
        """The ranks that a pruner belongs to now.

        Args:
            group: as given to `DynamicPruner`.
            around: the DistributedDataParallel wrappers of its model.
            caller: the method that asks.

        Raises:
            TypeError: it is no group.
            ValueError: this process does not belong to the group, or what is asked for cannot be.
        """
        alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        if group is False and any(torch.distributed.get_world_size(each.process_group) > 1 for each in around):
            raise ValueError(
                "process_group: False lets each process prune by itself, but DistributedDataParallel keeps this "
                "model the same on all of them"
            )
        if group is False or (group is None and alone):
            return cls(None, caller=caller)
        if alone:
            raise ValueError("process_group: torch.distributed is not initialised in this process")
        if group is None:
            group = around[0].process_group if around else torch.distributed.group.WORLD
        if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:  # what new_group returns to outsiders
            raise ValueError("process_group: this process does not belong to it")
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(
                f"process_group: expected a torch.distributed.ProcessGroup, False or None, got {type(group).__name__}"
            )
        return cls(group, caller=caller)

    def together(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on each rank, in their order; it is called here, and by the others there.

        Raises:
            RuntimeError: it failed on some rank. On every rank the same error, which names the rank; where the
                action failed here, it is the cause.
            Exception: alone, whatever the action raises.
        """
        if self.size == 1:
            return [action()]
        failure, result = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        told = None if failure is None else f"{type(failure).__name__}: {failure}"
        answers: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(answers, (result, told), group=self._group)
        failed = [f"rank {rank}: {told}" for rank, (_, told) in enumerate(answers) if told is not None]
        if failed:
            raise RuntimeError(f"{self._caller}: nothing was pruned on any rank, for {'; '.join(failed)}") from failure
        return [result for result, _ in answers]

    def require_same(self, records: Sequence[Mapping[str, object]]) -> None:
        """Raise, on every rank alike, where a record differs from that of rank 0.

        Raises:
            RuntimeError: naming the ranks, and what differs.
        """
        differing = []
        for rank, record in enumerate(records):
            keys = [key for key in {**records[0], **record} if records[0].get(key) != record.get(key)]
            if keys:
                told = ", ".join(key + _values(record.get(key), records[0].get(key)) for key in keys[:3])
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                differing.append(f"rank {rank} differs from rank 0 in {told}{more}")
        if differing:
            raise RuntimeError(
                f"{self._caller}: nothing was pruned on any rank, for {'; '.join(differing)}. Ranks that prune "
                "together must be alike; process_group=False prunes each by itself"
            )


def _values(value: object, of_rank_0: object) -> str:
    """What differs, in words; bytes stand for a hash, which says nothing."""
    return "" if isinstance(value, bytes) or isinstance(of_rank_0, bytes) else f" ({value}, not {of_rank_0})"


@dataclass(frozen=True)
class _Share:
    """What a rank observed: its part of the statistics, and what must be the same on all."""

    statistics: list[NeuronStatistics]
    outgoing: list[tuple[Tensor, Tensor]]
    record: dict[str, object]


def observe_together(
    ranks: Ranks,
    observe: Callable[[], Sequence[LayerObservation]],
    *,
    model: nn.Module,
    settings: PruningSettings,
    steps: int,
) -> tuple[LayerObservation, ...]:
    """The observations of all ranks' samples: statistics added in the order of the ranks, so the same bits on each.

    The norms of the weights are rank 0's, for processors of other kinds may round theirs otherwise.

    Args:
        ranks: the processes.
        observe: this rank's observations.
        model: whose parameters must be the same on all ranks.
        settings: which must be the same.
        steps: which must be the same.

    Raises:
        RuntimeError: on every rank, where one of them failed to observe or differs from the others.
    """
    observed: list[Sequence[LayerObservation]] = []

    def share() -> _Share:
        mine = observe()
        observed.append(mine)
        return _Share(
            [each.statistics for each in mine],
            [(each.outgoing, each.outgoing_unshifted) for each in mine],
            observed_record(mine, model, settings, steps),
        )

    if ranks.size == 1:
        return tuple(observe())
    shares = ranks.together(share)
    ranks.require_same([each.record for each in shares])
    joined = []
    for layer, mine in enumerate(observed[0]):
        statistics = NeuronStatistics.joined([each.statistics[layer] for each in shares])
        outgoing, unshifted = shares[0].outgoing[layer]
        joined.append(replace(mine, statistics=statistics, outgoing=outgoing, outgoing_unshifted=unshifted))
    return tuple(joined)


def plan_together(
    ranks: Ranks, plan: Callable[[], tuple[Sequence[LayerDecision], T]]
) -> tuple[Sequence[LayerDecision], T]:
    """What `plan` returns, once every rank has planned the same removals.

    Raises:
        RuntimeError: on every rank, where one of them failed or decided otherwise.
    """
    if ranks.size == 1:
        return plan()
    planned = []

    def removals() -> dict[str, object]:
        planned.append(plan())
        return planned_record(planned[0][0])

    ranks.require_same(ranks.together(removals))
    return planned[0]


class Confirmation:
    """The last exchange of a prune: every rank has applied its plan, or all put everything back.

    Call `done` as the last step of applying; use it as a context manager around all of it, so that the others hear of
    an error that comes before.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._told = ranks, False

    def done(self) -> None:
        """Tell the others, and wait for them.

        Raises:
            RuntimeError: one of them failed.
        """
        self._told = True
        self._ranks.together(lambda: None)

    def __enter__(self) -> Confirmation:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not self._told and self._ranks.size > 1:

            def failed() -> None:
                raise error

            self._ranks.together(failed)
