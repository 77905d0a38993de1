"""The arguments of `DynamicPruner`: what is wrong with them, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from numbers import Integral, Real

import torch
from torch import nn
from torch.optim import Optimizer

from kddp_ext.pruning.optimizer_state import require_sliceable_optimizer
from kddp_ext.pruning.tracing.find import UnsupportedModelError
from kddp_ext.pruning.tracing.groups import NeuronGroup

LIMIT = 2**63  # of counts: what tensors hold


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, or one whose parameters something else keeps in its own layout."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "model: DataParallel computes in replicas, where nothing can be observed; use DistributedDataParallel"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("model: a scripted module cannot be changed; pass the module it was made from")
    if any(nn.parameter.is_lazy(each) for each in (*model.parameters(), *model.buffers())):
        raise UnsupportedModelError("model: its lazy modules have no parameters yet; call it on a batch first")


def checked_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None, model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers, each able to follow this model; refused is what is none, or one whose state cannot follow."""
    if optimizer is None or isinstance(optimizer, Optimizer):
        optimizers: Sequence[Optimizer] = () if optimizer is None else (optimizer,)
    elif isinstance(optimizer, Sequence) and all(isinstance(each, Optimizer) for each in optimizer):
        optimizers = optimizer
    else:
        got = f"{optimizer!r}" if isinstance(optimizer, list | tuple) else type(optimizer).__name__
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, a list of them or None, got {got}")
    for each in optimizers:
        require_sliceable_optimizer(each)
        held = {id(parameter) for group in each.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise ValueError(
                f"optimizer: {type(each).__name__} holds none of the model's parameters; was it made for another model?"
            )
    return tuple(optimizers)


def choose_layers(
    model: nn.Module,
    groups: Mapping[str, NeuronGroup],
    refused: Mapping[str, str],
    layers: Sequence[str] | None,
) -> tuple[NeuronGroup, ...]:
    """The groups to prune, in the order of the forward pass: those named, or all."""
    if layers is None:
        if groups:
            return tuple(groups.values())
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise UnsupportedModelError(
            f"model: it has no layer that can be pruned{reasons or ', for it has no Linear or convolution'}"
        )
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(n, str) for n in layers):
        raise TypeError(f"layers: expected a list of layer names or None, got {layers!r}")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers: expected at least one name, each once, got {layers!r}")
    producers = {name: group for group in groups.values() for name in group.producers}
    for name in layers:
        if name not in producers:
            raise UnsupportedModelError(f"layers: {name} cannot be pruned: {_reason(model, name, groups, refused)}")
    return tuple(group for group in groups.values() if not set(layers).isdisjoint(group.producers))


def _reason(model: nn.Module, name: str, groups: Mapping[str, NeuronGroup], refused: Mapping[str, str]) -> str:
    if name in refused:
        return refused[name]
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        return f"the model has no such module; its layers that can be pruned are {', '.join(groups) or 'none'}"
    return f"it is a {type(modules[name]).__name__}; only Linear layers and convolutions have neurons of their own"


def share(name: str, value: object) -> float:
    """A number in (0, 1]."""
    number = _number(name, value)
    if not 0 < number <= 1:  # nor NaN
        raise ValueError(f"{name}: expected more than 0 and at most 1, got {value!r}")
    return number


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    number = _number(name, value)
    if not 0 < number < inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return number


def not_negative(name: str, value: object) -> float:
    """A finite number of at least 0."""
    number = _number(name, value)
    if not 0 <= number < inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    return number


def at_least_one(name: str, value: object) -> int:
    """A whole number of at least 1."""
    return whole_number(name, value, at_least=1)


def whole_number(name: str, value: object, *, at_least: int) -> int:
    """A whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
    if int(value) >= LIMIT:
        raise ValueError(f"{name}: expected less than 2**63, got more")
    return int(value)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a finite number, got one that no float can hold") from error
