"""What ranks that prune together must agree in, by the names that an error gives it: values, or hashes of bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from kddp_ext.pruning.observation import LayerObservation
from kddp_ext.pruning.selection import LayerDecision
from kddp_ext.pruning.settings import PruningSettings


def observed_record(
    observations: Sequence[LayerObservation], model: nn.Module, settings: PruningSettings, steps: int
) -> dict[str, object]:
    """What they must agree in before they decide."""
    record: dict[str, object] = {f"the width of {each.group.name}": each.group.width for each in observations}
    record |= {f"the positions of {each.group.name}": each.group.positions for each in observations}
    for each in fields(settings):
        value = getattr(settings, each.name)
        record[each.name] = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value
    record["the number of steps"] = steps
    for seen in observations:
        counters = [seen.inactive_checks, seen.original, *([] if seen.first_scales is None else [seen.first_scales])]
        record[f"the history of {seen.group.name}"] = _digest(counters)
    return record | {f"the weights {name}": value for name, value in _fingerprints(model).items()}


def planned_record(decisions: Sequence[LayerDecision]) -> dict[str, object]:
    """What they must agree in before they remove anything."""
    record: dict[str, object] = {"the neurons to be removed": _digest(each.keep for each in decisions)}
    for each in decisions:
        reconstruction = each.removal.reconstruction if each.pruned.numel() else None
        if reconstruction is not None:
            told = f"the reconstruction of what is removed of {each.group.name} (reconstruction_samples=0 does without)"
            record[told] = _digest([reconstruction.left, reconstruction.right])
    return record


def _digest(tensors: Iterable[Tensor]) -> bytes:
    """A hash of the tensors' bits; they are on the CPU."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.digest()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprints(model: nn.Module) -> dict[str, bytes]:
    """A number for each parameter, of its bits: exact, whatever the device and the order of its sums."""
    found = {name: _fingerprint(parameter.detach()) for name, parameter in model.named_parameters()}
    device = next(iter(found.values())).device
    numbers = torch.stack([each.to(device) for each in found.values()]).tolist()  # the host waits once
    return {name: number.to_bytes(8, "little", signed=True) for name, number in zip(found, numbers, strict=True)}


def _fingerprint(tensor: Tensor) -> Tensor:
    bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = bits.view(_INTEGERS[bits.element_size()])
    bits = bits.flatten(1) if bits.dim() > 1 else bits.reshape(-1, 1)
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    places = [torch.arange(1, len(each) + 1, device=each.device) for each in (rows, columns)]
    return (rows * places[0]).sum() * 31 + (columns * places[1]).sum()
