"""Labels of the entries along each dimension of each tensor; entries with equal labels are removed together.

Each dimension of each stored tensor begins with labels of its own. An operation gives labels to its outputs and states
which labels must be equal. Labels of entries that cannot be removed are frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Axes = list[Tensor | None]
"""For each dimension of a tensor its labels, (size,) int64; None where the entries cannot be removed."""


class Labels:
    """The labels of a forward pass, or of the same model's passes in both modes."""

    def __init__(self) -> None:
        self._axes: dict[int, Axes] = {}  # by the id of a tensor
        self._equal: list[tuple[Tensor, Tensor]] = []
        self._frozen: list[tuple[Tensor, str]] = []
        self.number = 0
        self.stored = 0  # the labels below are those of stored tensors
        self.is_used = True  # whether the model uses what the present operation returns; else nothing is frozen

    def new(self, size: int) -> Tensor:
        """`size` labels that nothing else has."""
        self.number += size
        return torch.arange(self.number - size, self.number, device="cpu")

    def of(self, tensor: Tensor) -> Axes:
        """The labels of a tensor."""
        return self._axes.get(id(tensor)) or [None] * tensor.dim()

    def set(self, tensor: Tensor, axes: Iterable[Tensor | None]) -> None:
        """Give a tensor its labels. An in-place operation returns a tensor that has labels, which become equal."""
        axes = list(axes)
        for old, new in zip(self._axes.get(id(tensor)) or axes, axes, strict=True):
            self.unite(old, new, "an operation in place changes a part of them")
        self._axes[id(tensor)] = axes

    def unite(self, a: Tensor | None, b: Tensor | None, reason: str) -> Tensor | None:
        """State that the labels are equal, entry by entry, and return them.

        Where one is None, the other is frozen for `reason`, and the result is None.
        """
        if a is None or b is None or a.numel() != b.numel():
            self.freeze(a, reason)
            self.freeze(b, reason)
            return None
        if a is not b:
            self._equal.append((a, b))
        return a

    def unite_rows(self, rows: Tensor) -> Tensor:
        """State that the rows of (rows, n) labels are equal, and return the first one."""
        if len(rows) > 1:
            self._equal.append((rows[:-1].flatten(), rows[1:].flatten()))
        return rows[0]

    def freeze(self, labels: Tensor | None, reason: str, *, foremost: bool = False) -> None:
        """State that the entries with these labels cannot be removed; the first or a `foremost` reason is given."""
        if labels is not None and labels.numel() and self.is_used:
            self._frozen.insert(0 if foremost else len(self._frozen), (labels, reason))

    def freeze_all(self, tensors: Iterable[Tensor], reason: str) -> None:
        """The same for all dimensions of some tensors."""
        for tensor in tensors:
            for labels in self.of(tensor):
                self.freeze(labels, reason)

    def classes(self) -> tuple[Tensor, list[str | None]]:
        """The class of each label, (number,) int64, and for each class why it is frozen, or None."""
        lowest = torch.arange(self.number, device="cpu")
        if self._equal:
            a, b = (torch.cat([pair[side] for pair in self._equal]) for side in (0, 1))
            while True:  # each label takes the lowest label that it is known to be equal to
                low = torch.minimum(lowest[a], lowest[b])
                before = lowest.clone()
                for side in (a, b):
                    lowest.scatter_reduce_(0, before[side], low, "amin")
                lowest = lowest[lowest]
                if torch.equal(lowest, before):
                    break
        first = torch.full((self.number,), -1, device="cpu")
        for index, (labels, _) in reversed(list(enumerate(self._frozen))):  # the first reason stays
            first[lowest[labels]] = index
        return lowest, [None if index < 0 else self._frozen[index][1] for index in first.tolist()]


def varying_axes(labels: Tensor) -> list[int]:
    """The dimensions along which a tensor of labels is not constant."""
    return [
        axis
        for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True))
        if size > 1 and stride != 0 and not torch.equal(labels, labels.narrow(axis, 0, 1).expand_as(labels))
    ]


def along(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """The labels of one dimension as a tensor of the whole shape, without copying."""
    return labels.view([-1 if each == axis else 1 for each in range(len(shape))]).expand(tuple(shape))
