"""DistributedDataParallel around a model whose parameters changed their shapes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kddp_ext.pruning.compaction import set_data
from kddp_ext.pruning.tracing.find import UnsupportedModelError

# What the wrapper's own unpickling goes through; torch has no public way to make its buckets anew.
_NEEDED = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper", "_set_static_graph")


@torch.inference_mode(False)  # the buckets must outlive it
def rewrap(ddp: DistributedDataParallel) -> DistributedDataParallel:
    """Bring a DistributedDataParallel in line with its module's parameters, as if it had been made now.

    Its buckets of gradients and its hooks on the parameters are of the shapes that these had when it was made. They
    are made anew, in place: settings, process group, communication hooks and the hooks of the module stay. Nothing is
    communicated; every rank must do the same between the same two steps. `DynamicPruner.prune()` does this by itself;
    after `PruningHistory.replay` or a change by hand it is called for.

    A communication hook that keeps tensors of the buckets' sizes (PowerSGD) has to forget them.

    Args:
        ddp: the wrapper. No backward pass may be under way.

    Returns:
        The same object.

    Raises:
        TypeError: it is no DistributedDataParallel.
        UnsupportedModelError: (a ValueError) it has nothing to synchronise, or was made with settings that
            cannot be carried over.
    """
    require_rewrappable(ddp)
    before = ddp.reducer
    for parameter in ddp.module.parameters():
        if type(parameter) is nn.Parameter:  # an old graph must not reach the new buckets' hooks
            set_data(parameter, parameter.data, parameter.grad)
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp.static_graph = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was said when the wrapper was made
            ddp._set_static_graph()
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    before._remove_autograd_hooks()
    return ddp


def require_rewrappable(ddp: DistributedDataParallel) -> None:
    """Raise what `rewrap` would, changing nothing."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp: expected a DistributedDataParallel, got {type(ddp).__name__}")
    reason = _reason_against(ddp)
    if reason is not None:
        raise UnsupportedModelError(f"model: its DistributedDataParallel cannot be made anew: {reason}")


def _reason_against(ddp: DistributedDataParallel) -> str | None:
    if not all(hasattr(ddp, name) for name in (*_NEEDED, "reducer", "_comm_hooks")):
        return f"torch {torch.__version__} keeps its buckets in a way that is not known"
    if ddp.mixed_precision is not None:
        return "mixed_precision keeps a second set of parameters"
    if ddp._delay_all_reduce_params:
        return "delay_all_reduce_named_params keeps a buffer of the gradients"
    parameters = list(ddp.module.named_parameters())
    if any(hasattr(parameter, "_in_backward_optimizers") for _, parameter in parameters):
        return "the optimizer runs inside of the backward pass"
    if not any(p.requires_grad and name not in ddp.parameters_to_ignore for name, p in parameters):
        return "every parameter is frozen, so that there is nothing to synchronise"
    hook = ddp._get_ddp_logging_data().get("comm_hook", "")
    if hook and not ddp._comm_hooks:
        return f"{hook} was registered by a private function; register_comm_hook can be followed"
    return None


def wrappers_of(modules: Iterable[nn.Module]) -> tuple[DistributedDataParallel, ...]:
    """Every DistributedDataParallel in this process that holds some of `modules`, or is held by one, at any depth.

    A model does not know its wrapper, and one that is overlooked would go on without synchronising.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    wanted = {id(each) for module in modules for each in module.modules()}
    wrappers = [each for each in gc.get_objects() if DistributedDataParallel in type(each).__mro__]
    return tuple(each for each in wrappers if not wanted.isdisjoint(map(id, each.modules())))
