"""Telling apart the memory that tensors lie in."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    """Equal for tensors that lie in the same memory; one that has none is alike to itself alone, while it lives.

    Views of one tensor are equal, wherever in it they begin.
    """
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)
