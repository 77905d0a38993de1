"""Digests by which a file that has changed since it was written is found out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, made of what JSON knows, and under "sha256" the SHA-256 of it: of its JSON with sorted keys."""
    return {**value, "sha256": hash_json(value)}


def without_digest(value: dict[str, Any]) -> dict[str, Any]:
    """What `with_digest` was given; a value that has no digest is taken as it is.

    Raises:
        ValueError: the value has changed since.
    """
    rest = {key: each for key, each in value.items() if key != "sha256"}
    if "sha256" in value and value["sha256"] != hash_json(rest):
        raise ValueError("its content does not match its sha256")
    return rest


def hash_json(value: dict[str, Any]) -> str:
    """SHA-256 of the JSON of `value` with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()
