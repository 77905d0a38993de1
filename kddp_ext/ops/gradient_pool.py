"""A pool that reuses the memory of gradients.

PyTorch returns the CPU memory of a large tensor to the system when the tensor dies, and the system hands it out again
page by page, zeroed. For the gradient of a large batch this takes longer than computing it. A training loop drops its
gradients at each step, so the pool keeps their memory for the next step.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict

import torch
from torch import Tensor

_SMALLEST = 64 << 10  # bytes; the heap reuses smaller blocks itself
_use_count = torch._C._storage_Use_Count


class _Kept:
    """A tensor of the pool. Other users hold its storage through a tensor or through Python's storage object."""

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
    """A pool of CPU tensors whose memory is reused when no tensor, view, array or graph refers to it any more.

    Args:
        limit: number of bytes that the pool may keep, in use or not; at least 0. PyTorch serves larger requests.

    Raises:
        TypeError, ValueError: the limit is not such a number; setting it later raises as well.
    """

    def __init__(self, limit: float) -> None:
        self._limit = _checked(limit)
        self._kept: defaultdict[tuple[torch.Size, torch.dtype], list[_Kept]] = defaultdict(list)
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def limit(self) -> float:
        """Number of bytes that the pool may keep. Lowering it frees unused memory above the new limit at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: float) -> None:
        with self._lock:
            self._limit = _checked(limit)
            self._drop_unused(until=limit)

    @property
    def bytes(self) -> int:
        """Number of bytes in the pool, in use or not."""
        return self._bytes

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous CPU tensor."""
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
        """Return all unused memory to PyTorch."""
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
"""The pool for the loss's gradients on the CPU, up to 1 GiB: `kddp_ext.gradient_pool`."""
