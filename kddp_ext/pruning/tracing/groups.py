"""What belongs to a layer's neurons: slices of tensors, sizes of modules, and the layers that read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kddp_ext.pruning.tracing.graph import StoredTensor


@dataclass(frozen=True)
class Layout:
    """How neurons lie along one dimension of a tensor.

    The dimension has outer · neurons · inner entries, and entry (o · neurons + j) · inner + i belongs to neuron j. A
    channel that is flattened with its positions has inner = positions; flattened behind them, outer = positions.

    Attributes:
        axis: the dimension.
        outer: how often all neurons come, one after the other.
        inner: entries of a neuron side by side.
    """

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def entries(self) -> int:
        """Entries of each neuron."""
        return self.outer * self.inner

    def indices(self, neurons: Tensor, width: int) -> Tensor:
        """The entries, ascending int64, of `neurons`, ascending among `width`."""
        if self.entries == 1:
            return neurons
        outer = torch.arange(self.outer, device=neurons.device).view(-1, 1, 1) * width
        inner = torch.arange(self.inner, device=neurons.device)
        return ((outer + neurons.view(-1, 1)) * self.inner + inner).flatten()

    def reshaped(self, before: Sequence[int], after: Sequence[int]) -> Layout | None:
        """Where the neurons of a tensor of shape `before` lie once it is reshaped to `after`; None where apart."""
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
        # Only a single neuron can be found in several dimensions; then it stays as it was, if it can.
        return min(found, key=lambda layout: (layout.outer != self.outer, layout.axis)) if found else None


def all_but(neurons: Tensor, width: int) -> Tensor:
    """The other neurons of `width`, ascending int64 on the CPU, without regard to the order of `neurons`."""
    others = torch.ones(width, dtype=torch.bool, device="cpu")
    others[neurons] = False
    return others.nonzero().flatten()


@dataclass(frozen=True)
class NeuronSlices:
    """A stored tensor that has slices of each neuron."""

    stored: StoredTensor
    layout: Layout


@dataclass(frozen=True)
class NeuronCount:
    """A module's attribute that holds the number of neurons, times `entries`."""

    module: str
    attribute: str
    entries: int = 1


@dataclass(frozen=True)
class Reader:
    """A Linear or a convolution that reads the neurons.

    Attributes:
        module: its name.
        layout: how the neurons lie along dimension 1 of its weight.
        shift: what takes up the average contribution of pruned neurons: the layer's own bias, or the running
            mean of the BatchNorm behind a layer without bias. None where there is neither.
        padded: whether it is a convolution that reads zeros beyond the border.
    """

    module: str
    layout: Layout
    shift: StoredTensor | None
    padded: bool = False

    @property
    def weight(self) -> StoredTensor:
        """The (outputs, neurons · entries, ...) weight."""
        return StoredTensor(self.module, "weight")


@dataclass(frozen=True)
class NeuronGroup:
    """The neurons of one layer, or of several that are multiplied with each other, and all that belongs to them.

    Attributes:
        name: the first of the layers whose outputs they are.
        producers: those layers, in the order of the forward pass; more than one where they gate each other.
        width: how many neurons there are now.
        slices: the stored tensors that have slices of each neuron.
        counts: the attributes that hold the width.
        readers: the layers that read them, all the same value.
        value: how they lie in that value.
        dimensions: how many dimensions that value has.
        dropouts: nn.Dropout modules directly before the first reader: the value is observed before these.
    """

    name: str
    producers: tuple[str, ...]
    width: int
    slices: tuple[NeuronSlices, ...]
    counts: tuple[NeuronCount, ...]
    readers: tuple[Reader, ...]
    value: Layout
    dimensions: int
    dropouts: tuple[str, ...] = field(compare=False)

    def reader(self, stored: StoredTensor) -> Reader | None:
        """The reader whose weight `stored` is."""
        return next((reader for reader in self.readers if reader.weight == stored), None)

    @property
    def positions(self) -> int | None:
        """Entries of a neuron that the readers weight apart, as behind a flatten; None where there is one."""
        return self.value.entries if self.value.entries > 1 else None

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules whose outputs are the neurons: producers, norms, depthwise layers."""
        readers = {reader.module for reader in self.readers}
        return frozenset(slices.stored.module for slices in self.slices) - (readers - set(self.producers))
