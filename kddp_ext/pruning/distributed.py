"""Several processes prune alike: each has a share of the samples, and all make the same decision.

A prune has three exchanges, one in each of `gather`, `agree` and `apply_on_all`. At each of them, an error of one rank
becomes an error of all ranks, so no rank waits for another and none changes alone. A single process skips them.
`rewrap` updates DistributedDataParallel for parameters that have changed their shapes.
"""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.pruning.compaction import set_data
from kddp_ext.pruning.selection import LayerDecision, LayerObservation
from kddp_ext.pruning.settings import PruningSettings
from kddp_ext.pruning.tracing.find import UnsupportedModelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Ranks:
    """The processes of a group that prune together; no group where this process prunes by itself.

    `caller` is the public method that needs them, for the messages.
    """

    def __init__(self, group: ProcessGroup | None, *, caller: str) -> None:
        self._group, self._caller = group, caller
        self.size = 1 if group is None else torch.distributed.get_world_size(group)

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
                named = ", ".join(key + _values(record.get(key), records[0].get(key)) for key in keys[:3])
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                differing.append(f"rank {rank} differs from rank 0 in {named}{more}")
        if differing:
            raise RuntimeError(
                f"{self._caller}: nothing was pruned on any rank: {'; '.join(differing)}. Ranks that prune together "
                "must be alike; process_group=False lets each prune by itself"
            )


def _values(value: object, of_rank_0: object) -> str:
    """The values that differ; hashes are bytes and are not shown."""
    return "" if isinstance(value, bytes) or isinstance(of_rank_0, bytes) else f" ({value}, not {of_rank_0})"


# --- The three exchanges of a prune


def gather(
    ranks: Ranks,
    observe: Callable[[], Sequence[LayerObservation]],
    *,
    model: nn.Module,
    settings: PruningSettings,
    steps: int,
) -> Sequence[LayerObservation]:
    """The observations of all ranks' samples; `model`, `settings` and the number of `steps` must be the same on all.

    The statistics are added in the order of the ranks, which gives the same bits on each. The norms of the weights are
    rank 0's, because processors of different kinds may round them differently.
    """
    if ranks.size == 1:
        return observe()
    own: list[LayerObservation] = []

    def share() -> tuple[list[tuple[NeuronStatistics, Tensor, Tensor]], dict[str, object]]:
        own.extend(observe())
        observed = [(layer.statistics, layer.outgoing, layer.outgoing_unshifted) for layer in own]
        return observed, _record_of_observations(own, model, settings, steps)

    shares = ranks.all_or_raise(share)
    ranks.require_same([record for _, record in shares])
    gathered = []
    for index, layer in enumerate(own):
        statistics = NeuronStatistics.joined([observed[index][0] for observed, _ in shares])
        _, outgoing, unshifted = shares[0][0][index]
        gathered.append(replace(layer, statistics=statistics, outgoing=outgoing, outgoing_unshifted=unshifted))
    return gathered


def agree(ranks: Ranks, plan: Callable[[], tuple[Sequence[LayerDecision], T]]) -> T:
    """What `plan` returns with its decisions, once every rank has made the same decisions."""
    if ranks.size == 1:
        return plan()[1]
    own: list[T] = []

    def record() -> dict[str, object]:
        decisions, planned = plan()
        own.append(planned)
        return _record_of_decisions(decisions)

    ranks.require_same(ranks.all_or_raise(record))
    return own[0]


def apply_on_all(ranks: Ranks, apply: Callable[[Callable[[], object]], object]) -> None:
    """Call `apply(confirm)` on every rank; `apply` must call `confirm` last, and undo everything where it raises."""
    if ranks.size == 1:
        apply(lambda: None)
        return
    failure: Exception | None = None
    confirmed = False

    def confirm() -> None:
        nonlocal confirmed
        confirmed = True
        if failure is not None:
            raise failure

    try:
        apply(lambda: ranks.all_or_raise(confirm))
    except Exception as error:
        if confirmed:
            raise
        failure = error
        ranks.all_or_raise(confirm)


# --- What ranks must agree in: values, or hashes of bits, by the names that an error message gives them


def _record_of_observations(
    observations: Sequence[LayerObservation], model: nn.Module, settings: PruningSettings, steps: int
) -> dict[str, object]:
    record: dict[str, object] = {f"the width of {each.group.name}": each.group.width for each in observations}
    record |= {f"the positions of {each.group.name}": each.group.positions for each in observations}
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        record[setting.name] = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value
    record["the number of steps"] = steps
    for each in observations:
        counters = [each.inactive_checks, each.original, *([] if each.first_scales is None else [each.first_scales])]
        record[f"the history of {each.group.name}"] = _digest(counters)
    return record | {f"the weights {name}": value for name, value in _fingerprints(model).items()}


def _record_of_decisions(decisions: Sequence[LayerDecision]) -> dict[str, object]:
    record: dict[str, object] = {"the neurons to be removed": _digest(each.keep for each in decisions)}
    for each in decisions:
        if each.reconstruction is not None:
            name = f"the reconstruction of removed neurons of {each.group.name} (reconstruction_samples=0 avoids it)"
            record[name] = _digest([each.reconstruction.left, each.reconstruction.right])
    return record


def _digest(tensors: Iterable[Tensor]) -> bytes:
    """A hash of the bits of tensors on the CPU."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.digest()


def _fingerprints(model: nn.Module) -> dict[str, bytes]:
    """A number for each parameter, computed exactly from its bits on any device."""
    found = {name: _fingerprint(parameter.detach()) for name, parameter in model.named_parameters()}
    device = next(iter(found.values())).device
    numbers = torch.stack([each.to(device) for each in found.values()]).tolist()  # one synchronisation for all
    return {name: number.to_bytes(8, "little", signed=True) for name, number in zip(found, numbers, strict=True)}


def _fingerprint(tensor: Tensor) -> Tensor:
    bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = bits.view(integers[bits.element_size()])
    bits = bits.flatten(1) if bits.dim() > 1 else bits.reshape(-1, 1)
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    places = [torch.arange(1, len(each) + 1, device=each.device) for each in (rows, columns)]
    return (rows * places[0]).sum() * 31 + (columns * places[1]).sum()


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
