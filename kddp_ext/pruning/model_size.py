"""The size of a model with any of its neurons: its parameters, and the multiply-accumulates of one sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kddp_ext.pruning.tracing.structure import PrunableNeurons, StoredTensor


@dataclass(frozen=True)
class _Term:
    """A sliced tensor that counts: `parameters` (1 or 0) and `macs` for each of its entries."""

    stored: StoredTensor
    parameters: int
    macs: float


class ModelSize:
    """Parameters and multiply-accumulates of a model with any of its neurons.

    `positions` is that of `TracedNeurons`; weights that are missing there count as parameters only.
    """

    def __init__(self, model: nn.Module, neurons: PrunableNeurons, positions: Mapping[StoredTensor, float]) -> None:
        self.neurons = neurons
        sliced = {id(stored.of(model)): stored for stored in neurons.slices}
        weights = {id(stored.of(model)): (stored.of(model), count) for stored, count in positions.items()}
        parameters = {id(each): each for each in model.parameters()}
        self._terms = [
            _Term(stored, int(key in parameters), weights[key][1] if key in weights else 0.0)
            for key, stored in sliced.items()
            if key in parameters or key in weights
        ]
        self._fixed_parameters = sum(each.numel() for key, each in parameters.items() if key not in sliced)
        self._fixed_macs = sum(each.numel() * count for key, (each, count) in weights.items() if key not in sliced)

    def at(self, keep: Tensor | None = None) -> tuple[int, int]:
        """Parameters of the whole model, and multiply-accumulates of one sample, with the neurons `keep` (all)."""
        if keep is None:
            keep = torch.ones(self.neurons.number, dtype=torch.bool, device="cpu")
        sizes = [math.prod(self.neurons.shape_after(term.stored, keep)) for term in self._terms]
        parameters = sum(size * term.parameters for size, term in zip(sizes, self._terms, strict=True))
        macs = sum(size * term.macs for size, term in zip(sizes, self._terms, strict=True))
        return round(self._fixed_parameters + parameters), round(self._fixed_macs + macs)

    def removing(self, orders: Sequence[Tensor]) -> RemainingSize:
        """The size while the neurons of each group go, in the order of their indices in `orders`."""
        return RemainingSize(self, orders)


class RemainingSize:
    """The size of a model while its neurons go one after another, in a fixed order within each group.

    It follows each removal at the cost of the tensors that the group's neurons have entries of.

    Attributes:
        gone: how many neurons of each group have gone.
        parameters, macs: what is left.
    """

    def __init__(self, size: ModelSize, orders: Sequence[Tensor]) -> None:
        neurons = size.neurons
        self.parameters, self.macs = (float(each) for each in size.at())
        self.gone = [0] * len(orders)
        self._widths = [group.width for group in neurons.groups]
        self._names = [group.name for group in neurons.groups]
        self._terms = size._terms
        self._shapes = [list(neurons.shapes[term.stored]) for term in self._terms]
        # By group: the terms and dimensions that it has entries of, and how many go with its first 0, 1, 2... neurons.
        self._entries: list[dict[int, dict[int, list[int]]]] = [{} for _ in orders]
        for index, term in enumerate(self._terms):
            for axis, numbers in neurons.slices[term.stored].items():
                counts = torch.bincount(numbers[numbers >= 0], minlength=neurons.number)
                for entries, group, order in zip(self._entries, neurons.groups, orders, strict=True):
                    own = counts[group.numbers]
                    if bool(own.any()):
                        entries.setdefault(index, {})[axis] = [0, *own[order].cumsum(0).tolist()]

    @property
    def widths(self) -> dict[str, int]:
        """Present number of neurons by layer."""
        return {n: width - gone for n, width, gone in zip(self._names, self._widths, self.gone, strict=True)}

    def saved(self, group: int, count: int) -> tuple[float, float]:
        """Parameters and multiply-accumulates that go with the next neurons of a group, until `count` are gone."""
        parameters = macs = 0.0
        for index, by_axis in self._entries[group].items():
            term, shape = self._terms[index], self._shapes[index]
            after = shape.copy()
            for axis, entries in by_axis.items():
                after[axis] -= entries[count] - entries[self.gone[group]]
            less = math.prod(shape) - math.prod(after)
            parameters += less * term.parameters
            macs += less * term.macs
        return parameters, macs

    def remove(self, group: int, count: int) -> None:
        """Remove the next neurons of a group, until `count` are gone."""
        parameters, macs = self.saved(group, count)
        self.parameters -= parameters
        self.macs -= macs
        for index, by_axis in self._entries[group].items():
            for axis, entries in by_axis.items():
                self._shapes[index][axis] -= entries[count] - entries[self.gone[group]]
        self.gone[group] = count
