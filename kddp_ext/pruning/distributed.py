"""Several processes prune alike: each has a share of the samples, and all make the same decision.

At each exchange of a prune, an error of one rank becomes an error of all ranks, so no rank waits for another and none
changes alone. `rewrap` updates DistributedDataParallel for parameters that have changed their shapes.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.files import hash_tensors
from kddp_ext.pruning.compaction import set_data
from kddp_ext.pruning.saliency import Saliency
from kddp_ext.pruning.selection import Observation
from kddp_ext.pruning.settings import PruningSettings
from kddp_ext.pruning.tracing.recording import UnsupportedModelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Ranks:
    """The processes of a group that prune together; no group where this process prunes by itself.

    `caller` is the public method that needs them, for the messages.
    """

    def __init__(self, group: ProcessGroup | None, *, caller: str) -> None:
        self._group, self._caller = group, caller
        self.rank, self.size = 0, 1
        if group is not None:
            self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

    @classmethod
    def of(cls, group: ProcessGroup | Literal[False] | None, wrappers: Sequence[Any], *, caller: str) -> Ranks:
        """The ranks of a pruner with the argument `group`, whose model has these DistributedDataParallel wrappers."""
        alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        if group is False and any(torch.distributed.get_world_size(each.process_group) > 1 for each in wrappers):
            raise ValueError(
                "process_group: False lets each process prune by itself, but DistributedDataParallel keeps this model "
                "the same on all of them"
            )
        if group is False or (group is None and alone):
            return cls(None, caller=caller)
        if alone:
            raise ValueError("process_group: torch.distributed is not initialised in this process")
        if group is None:
            group = wrappers[0].process_group if wrappers else torch.distributed.group.WORLD
        if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:  # new_group returns it to processes outside
            raise ValueError("process_group: this process does not belong to it")
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(
                f"process_group: expected a torch.distributed.ProcessGroup, False or None, got {type(group).__name__}"
            )
        return cls(group, caller=caller)

    def all_or_raise(self, action: Callable[[], T]) -> list[T]:
        """Call `action` on every rank; return the results of all ranks in their order.

        Where it fails on some rank, all ranks raise the same RuntimeError, which names that rank.
        """
        if self.size == 1:
            return [action()]
        failure, result = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        answers: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(answers, (result, message), group=self._group)
        failed = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(answers) if message is not None]
        if failed:
            raise RuntimeError(f"{self._caller}: nothing was pruned on any rank: {'; '.join(failed)}") from failure
        return [result for result, _ in answers]

    def require_same(self, records: Sequence[Mapping[str, object]]) -> None:
        """Raise a RuntimeError, on every rank alike, where a record differs from that of rank 0."""
        differing = []
        for rank, record in enumerate(records):
            keys = [key for key in {**records[0], **record} if records[0].get(key) != record.get(key)]
            if keys:
                named = ", ".join(_difference(key, record.get(key), records[0].get(key)) for key in keys[:3])
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                differing.append(f"rank {rank} differs from rank 0 in {named}{more}")
        if differing:
            raise RuntimeError(
                f"{self._caller}: nothing was pruned on any rank: {'; '.join(differing)}. Ranks that prune together "
                "must be alike; process_group=False lets each prune by itself"
            )


def _difference(name: str, value: object, of_rank_0: object) -> str:
    """The name and the values that differ; bytes are not shown."""
    return name if bytes in (type(value), type(of_rank_0)) else f"{name} ({value}, not {of_rank_0})"


# --- What a prune exchanges


def gather(
    ranks: Ranks,
    observe: Callable[[], Observation],
    *,
    model: nn.Module,
    settings: PruningSettings,
    steps: int,
) -> Observation:
    """The observations of all ranks' samples; `model`, `settings` and the number of `steps` must be the same on all.

    The statistics are added in the order of the ranks, which gives the same bits on each. The norms of the weights are
    rank 0's, because processors of different kinds may round them differently.
    """
    if ranks.size == 1:
        return observe()

    def share() -> tuple[Observation, dict[str, object]]:
        observation = observe()
        return observation, _record(observation, model, settings, steps)

    shares = ranks.all_or_raise(share)
    ranks.require_same([record for _, record in shares])
    values = zip(*(observation.statistics for observation, _ in shares), strict=True)
    saliency = Saliency.joined([observation.saliency for observation, _ in shares])
    return replace(shares[0][0], statistics=tuple(NeuronStatistics.joined(each) for each in values), saliency=saliency)


def from_rank_0(ranks: Ranks, action: Callable[[], T]) -> T:
    """The result of `action` on rank 0, for all ranks: processors of different kinds may round differently."""
    result = ranks.all_or_raise(lambda: action() if ranks.rank == 0 else None)[0]
    assert result is not None
    return result


def on_each_rank(ranks: Ranks, action: Callable[[], T]) -> T:
    """The result of `action` on this rank, once it has succeeded on all; results are not exchanged."""
    results: list[T] = []
    ranks.all_or_raise(lambda: results.append(action()))
    return results[0]


def _record(observation: Observation, model: nn.Module, settings: PruningSettings, steps: int) -> dict[str, object]:
    """What ranks must agree in: values, or bytes and hashes, by the names that an error message gives them."""
    record: dict[str, object] = {"the number of steps": steps}
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        record[setting.name] = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value
    neurons, scales = observation.neurons, observation.first_scales
    for group, original in zip(neurons.groups, observation.original, strict=True):
        first = [] if scales is None else [scales[:, group.numbers]]
        record[f"the width of {group.name}"] = group.width
        record[f"the history of {group.name}"] = _digest([observation.inactive_checks[group.numbers], original, *first])
    for stored, by_axis in neurons.slices.items():
        record[f"the slices of {stored.name}"] = _digest([torch.tensor(list(by_axis), device="cpu"), *by_axis.values()])
    for name, parameter in model.named_parameters():
        record[f"the weights {name}"] = _digest([parameter])
    return record


def _digest(tensors: Iterable[Tensor]) -> bytes:
    return bytes.fromhex(hash_tensors({str(index): tensor for index, tensor in enumerate(tensors)}))


# --- DistributedDataParallel

# torch has no public way to rebuild the buckets; its own unpickling calls these methods.
_NEEDED = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper", "_set_static_graph")


@torch.inference_mode(False)  # the buckets must be usable outside inference mode
def rewrap(ddp: DistributedDataParallel) -> DistributedDataParallel:
    """Update a DistributedDataParallel for the present shapes of its module's parameters, as if it had just been made.

    Its gradient buckets and its hooks on the parameters are rebuilt in place. Settings, process group, communication
    hooks and the module's hooks stay. Nothing is communicated, but every rank must call it between the same two steps.
    `DynamicPruner.prune()` calls it; call it yourself after `PruningHistory.replay` or a change by hand.

    A communication hook that keeps tensors of the buckets' sizes (PowerSGD) must discard them.

    Args:
        ddp: the wrapper. No backward pass may be running.

    Returns:
        The same object.

    Raises:
        TypeError: it is not a DistributedDataParallel.
        UnsupportedModelError: (a ValueError) it has no parameters to synchronise, or was made with settings that cannot
            be carried over.
    """
    require_rewrappable(ddp)
    before = ddp.reducer
    for parameter in ddp.module.parameters():
        if type(parameter) is nn.Parameter:  # an old graph must not reach the hooks of the new buckets
            set_data(parameter, parameter.data, parameter.grad)
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp.static_graph = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same warning was given when the wrapper was made
            ddp._set_static_graph()
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    before._remove_autograd_hooks()
    return ddp


def require_rewrappable(ddp: DistributedDataParallel) -> None:
    """Raise the errors of `rewrap`, changing nothing."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp: expected a DistributedDataParallel, got {type(ddp).__name__}")
    reason = _reason_against(ddp)
    if reason is not None:
        raise UnsupportedModelError(f"model: its DistributedDataParallel cannot be rebuilt: {reason}")


def _reason_against(ddp: DistributedDataParallel) -> str | None:
    if not all(hasattr(ddp, name) for name in (*_NEEDED, "reducer", "_comm_hooks")):
        return f"torch {torch.__version__} keeps its buckets in an unknown way"
    if ddp.mixed_precision is not None:
        return "mixed_precision keeps a second set of parameters"
    if ddp._delay_all_reduce_params:
        return "delay_all_reduce_named_params keeps a buffer of the gradients"
    parameters = list(ddp.module.named_parameters())
    if any(hasattr(parameter, "_in_backward_optimizers") for _, parameter in parameters):
        return "the optimizer runs inside the backward pass"
    if not any(p.requires_grad and name not in ddp.parameters_to_ignore for name, p in parameters):
        return "every parameter is frozen, so there is nothing to synchronise"
    hook = ddp._get_ddp_logging_data().get("comm_hook", "")
    if hook and not ddp._comm_hooks:
        return f"{hook} was registered by a private function; use register_comm_hook"
    return None


def wrappers_of(modules: Iterable[nn.Module]) -> tuple[DistributedDataParallel, ...]:
    """Every DistributedDataParallel in this process that contains some of `modules` or is contained in one.

    A model does not know its wrapper, and a wrapper that is missed would stop synchronising.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    wanted = {id(each) for module in modules for each in module.modules()}
    wrappers = [each for each in gc.get_objects() if DistributedDataParallel in type(each).__mro__]
    return tuple(each for each in wrappers if not wanted.isdisjoint(map(id, each.modules())))
