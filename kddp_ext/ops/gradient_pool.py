"""Memory for gradients that is used again once nobody holds it.

PyTorch gives CPU memory back to the system as soon as a large tensor dies, and the system hands it out again page by
page, cleared: for a large batch's gradient that takes longer than computing it. A training loop drops its gradients at
every step, so the pool keeps their memory for the next.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict

import torch
from torch import Tensor

_SMALLEST = 64 << 10  # the heap keeps what is smaller
_use_count = torch._C._storage_Use_Count


class _Kept:
    """A tensor of the pool. Who holds its memory counts either as a tensor or as Python's object of the storage."""

    __slots__ = ("_holders", "_storage", "tensor")

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(shape, dtype=dtype, device="cpu")
        self._storage = self.tensor.untyped_storage()
        self._holders = self._count_holders()

    def _count_holders(self) -> tuple[int, int]:
        return _use_count(self._storage._cdata), sys.getrefcount(self._storage)

    def is_free(self) -> bool:
        return self._count_holders() == self._holders


class GradientPool:
    """Tensors of which the pool keeps the memory.

    Memory is free once no tensor, view, array or graph refers to it but the pool.

    Args:
        limit: bytes that the pool may keep, in use or not, at least 0. A larger request is served by PyTorch alone.

    Raises:
        TypeError, ValueError: the limit is no such number, when it is set later as well.
    """

    def __init__(self, limit: float) -> None:
        self._limit = _checked(limit)
        self._kept: defaultdict[tuple[torch.Size, torch.dtype], list[_Kept]] = defaultdict(list)
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def limit(self) -> float:
        """Bytes that it may keep. Lowered, it gives up what is more and not in use at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: float) -> None:
        with self._lock:
            self._limit = _checked(limit)
            self._drop_unused(until=limit)

    @property
    def bytes(self) -> int:
        """Bytes that are kept at present, in use or not."""
        return self._bytes

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor, not filled."""
        size = shape.numel() * dtype.itemsize
        if not _SMALLEST <= size <= self._limit:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with self._lock:
            for kept in self._kept[shape, dtype]:
                if kept.is_free():
                    return kept.tensor.detach()
            if not self._make_room(size):
                return torch.empty(shape, dtype=dtype, device="cpu")
            self._kept[shape, dtype].append(_Kept(shape, dtype))
            self._bytes += size
            return self._kept[shape, dtype][-1].tensor.detach()

    def release(self) -> None:
        """Forget all memory that is not in use; it is PyTorch's again."""
        with self._lock:
            self._drop_unused(until=0)

    def _make_room(self, size: int) -> bool:
        if self._bytes + size > self._limit:
            self._drop_unused(until=self._limit - size)
        return self._bytes + size <= self._limit

    def _drop_unused(self, until: float) -> None:
        for key, kept in list(self._kept.items()):
            for entry in list(kept):
                if self._bytes <= until:
                    return
                if entry.is_free():
                    kept.remove(entry)
                    self._bytes -= entry.tensor.nbytes
            if not kept:
                del self._kept[key]


def _checked(limit: float) -> float:
    if not isinstance(limit, int | float):
        raise TypeError(f"limit: expected a number of bytes, got {limit!r}")
    if not limit >= 0:
        raise ValueError(f"limit: expected at least 0 bytes, got {limit}")
    return limit


pool = GradientPool(limit=1 << 30)
"""The pool that the loss takes its gradients on the CPU from: up to 1 GiB. `kddp_ext.gradient_pool` is this one."""
