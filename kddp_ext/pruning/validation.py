"""The arguments of `DynamicPruner`: what is wrong with them, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import nn
from torch.optim import Optimizer

from kddp_ext.pruning.compaction import require_sliceable_optimizer
from kddp_ext.pruning.neurons import NeuronGroup, UnsupportedModelError


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, or one whose parameters something else keeps in its own layout."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} keeps buckets of the parameters' present sizes; pass the module "
            "inside, model.module"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("model: a scripted module cannot be changed; pass the module it was made from")


def check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Refuse what is no optimizer, or one whose state cannot follow this model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    require_sliceable_optimizer(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError("optimizer: it holds none of the model's parameters; was it made for another model?")


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
        raise UnsupportedModelError(f"model: it has no layer that can be pruned{reasons or ', for it has no Linear'}")
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(n, str) for n in layers):
        raise TypeError(f"layers: expected a list of layer names or None, got {layers!r}")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers: expected at least one name, each once, got {layers!r}")
    for name in layers:
        if name not in groups:
            raise UnsupportedModelError(f"layers: {name} cannot be pruned: {_reason(model, name, groups, refused)}")
    return tuple(group for name, group in groups.items() if name in layers)


def _reason(model: nn.Module, name: str, groups: Mapping[str, NeuronGroup], refused: Mapping[str, str]) -> str:
    if name in refused:
        return refused[name]
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        return f"the model has no such module; its layers that can be pruned are {', '.join(groups) or 'none'}"
    return f"it is a {type(modules[name]).__name__}; only the neurons of Linear layers can be"


def share(name: str, value: object) -> float:
    """A number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    number = float(value)
    if not 0 < number <= 1:  # nor NaN
        raise ValueError(f"{name}: expected more than 0 and at most 1, got {value!r}")
    return number


def at_least_one(name: str, value: object) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)
