"""Copies of many tensors between devices, packed into one transfer, because each transfer makes the host wait."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def copied_to(value: T, device: torch.device | str) -> T:
    """A deep copy of nested tuples, lists, mappings and objects, in which each tensor is on `device`.

    The host waits once for each device that the tensors come from.
    """
    device, copies = torch.device(device), dict[int, Any]()
    tensors = {id(each): each for each in _tensors_in(value) if each.device != device}
    for source in dict.fromkeys(each.device for each in tensors.values()):
        # The widest first, so that each begins at a multiple of its element size.
        packed = sorted((e for e in tensors.values() if e.device == source), key=Tensor.element_size, reverse=True)
        moved = torch.cat([each.detach().contiguous().flatten().view(torch.uint8) for each in packed]).to(device)
        parts = moved.split([each.numel() * each.element_size() for each in packed])
        for each, part in zip(packed, parts, strict=True):
            content = part.view(each.dtype).view(each.shape)
            # A part of a shared buffer would be pickled with the whole buffer.
            copies[id(each)] = content.clone() if device.type == "cpu" else content
    return copy.deepcopy(value, copies)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from _tensors_in(list(vars(value).values()))
