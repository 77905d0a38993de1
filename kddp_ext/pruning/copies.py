"""Copies of the model that are pruned with it, such as moving averages of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from kddp_ext import ops
from kddp_ext.pruning.tracing.graph import uncompiled

# By the memory that a tensor lies in, whose it is.
_Owners = dict[tuple[torch.device, int], str]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module whose names are the constructor's: without torch.compile, DistributedDataParallel, AveragedModel."""
    while True:
        inner = uncompiled(module)
        if isinstance(inner, DistributedDataParallel | AveragedModel):
            inner = inner.module
        if inner is module:
            return module
        module = inner


def checked_copies(model: nn.Module, copies: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """The copies inside of their wrappers, proven to be of the model's structure and to have tensors of their own.

    Args:
        model: the model, without wrappers.
        copies: as given to `DynamicPruner`.

    Raises:
        TypeError: it is no sequence of modules.
        ValueError: one has other modules or other tensors than the model, or shares a tensor with it or with
            another copy. The message names it (`copies[0]`) and the tensor.
    """
    if isinstance(copies, nn.Module | str) or not isinstance(copies, Sequence):
        raise TypeError(f"copies: expected a list of modules, such as [ema_model], got {type(copies).__name__}")
    owners: _Owners = {ops.storage_key(tensor): "the model" for tensor in _tensors(model).values()}
    found = []
    for index, copy in enumerate(copies):
        if not isinstance(copy, nn.Module):
            raise TypeError(f"copies[{index}]: expected a torch.nn.Module, got {type(copy).__name__}")
        inner = unwrapped(copy)
        _check_modules(model, inner, f"copies[{index}]")
        _check_tensors(model, inner, f"copies[{index}]", owners)
        found.append(inner)
    return tuple(found)


def _check_modules(model: nn.Module, copy: nn.Module, role: str) -> None:
    expected, got = _kinds(model), _kinds(copy)
    for name in [*expected, *got]:
        if expected.get(name) is not got.get(name):
            kinds = [kinds[name].__name__ if name in kinds else "nothing" for kinds in (expected, got)]
            raise ValueError(f"{role}: {name or 'it'} is {kinds[1]}, and {kinds[0]} in the model")


def _check_tensors(model: nn.Module, copy: nn.Module, role: str, owners: _Owners) -> None:
    expected, got = _tensors(model), _tensors(copy)
    for name in [*expected, *got]:
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (expected, got)]
        if shapes[0] is None or shapes[1] is None:
            raise ValueError(f"{role}: {name} is {'missing in it' if shapes[0] else 'not in the model'}")
        if shapes[0] != shapes[1]:
            raise ValueError(f"{role}: {name} has shape {shapes[1]}, and {shapes[0]} in the model")
    for name, tensor in got.items():
        owner = owners.setdefault(ops.storage_key(tensor), role)
        if owner != role:
            raise ValueError(f"{role}: it shares {name} with {owner}; a copy needs tensors of its own")


def _kinds(module: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(each) for name, each in module.named_modules(remove_duplicate=False)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
