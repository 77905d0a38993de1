"""Where the neurons lie in a tensor, and activations of any shape as the matrices that the kernels read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The entries of each neuron along one dimension of a tensor.

    The dimension has outer · neurons · inner entries; entry (o · neurons + j) · inner + i belongs to neuron j. A
    channel that is flattened with its positions has inner = positions, or outer = positions in a channels-last order.

    Attributes:
        axis: the dimension.
        outer: how many times the sequence of all neurons repeats.
        inner: number of adjacent entries of one neuron.
    """

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def entries(self) -> int:
        """Number of entries of each neuron."""
        return self.outer * self.inner

    def indices(self, neurons: Tensor, width: int) -> Tensor:
        """The ascending entries of `neurons`, which are ascending indices below `width`; all int64."""
        if self.entries == 1:
            return neurons
        outer = torch.arange(self.outer, device=neurons.device).view(-1, 1, 1) * width
        inner = torch.arange(self.inner, device=neurons.device)
        return ((outer + neurons.view(-1, 1)) * self.inner + inner).flatten()

    def in_order(self, of_units: Tensor) -> Tensor:
        """Values of units, (units,) or (units, entries), in the order of the dimension's entries."""
        by_entry = of_units.view(len(of_units), -1).expand(-1, self.entries)
        return by_entry.reshape(len(of_units), self.outer, self.inner).transpose(0, 1).flatten()

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> Layout | None:
        """The layout after a reshape from `before` to `after`; None where one dimension cannot describe it."""
        width = before[self.axis] // self.entries
        ahead = math.prod(before[: self.axis]) * self.outer
        behind = self.inner * math.prod(before[self.axis + 1 :])
        found = []
        for axis, size in enumerate(after):
            prefix, suffix = math.prod(after[:axis]), math.prod(after[axis + 1 :])
            if prefix and suffix and ahead % prefix == 0 and behind % suffix == 0:
                layout = Layout(axis, ahead // prefix, behind // suffix)
                if layout.entries * width == size:
                    found.append(layout)
        # Only a layer of one neuron has several candidates. The one with the same `outer` is preferred.
        return min(found, key=lambda layout: (layout.outer != self.outer, layout.axis)) if found else None


class NeuronMatrix(NamedTuple):
    """An activation as a matrix for the kernels.

    Attributes:
        values: (rows, outer · neurons · inner).
        samples: number of values of each neuron.
        layout: the entries of each neuron along dimension 1.
    """

    values: Tensor
    samples: int
    layout: Layout = Layout(1)


def as_matrix(activation: Tensor, axis: int = 1, *, keep_positions: bool = False) -> NeuronMatrix:
    """View an activation as a matrix. It is copied only if its memory has no such view.

    Args:
        activation: at least 2 dimensions.
        axis: the dimension of the neurons, counted from the last if negative. All others are samples and positions.
        keep_positions: keep the entries of dimensions 1 and higher apart and in their order, instead of counting them
            as rows.
    """
    if axis < 0:
        axis += activation.dim()
    if activation.dim() == 2 and axis == 1:
        return NeuronMatrix(activation, activation.shape[0])
    shape = activation.shape
    outer, inner = math.prod(shape[1:axis]), math.prod(shape[axis + 1 :])
    samples = math.prod(shape[:axis]) * inner
    neurons_last = activation.movedim(axis, -1)
    if axis > 0 and (keep_positions or (activation.is_contiguous() and not neurons_last.is_contiguous())):
        return NeuronMatrix(activation.flatten(1), samples, Layout(1, outer, inner))
    return NeuronMatrix(neurons_last.flatten(0, -2), samples)
