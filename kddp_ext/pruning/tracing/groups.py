"""What belongs to a layer's neurons: slices of tensors, sizes of modules, and the layers that read them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kddp_ext.activations.layout import Layout


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer, named by the module that holds it."""

    module: str
    attribute: str

    @classmethod
    def named(cls, name: str) -> StoredTensor:
        """The tensor of this name in the model's state_dict."""
        module, _, attribute = name.rpartition(".")
        return cls(module, attribute)

    @property
    def name(self) -> str:
        """Its name in the model's state_dict."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute

    def of(self, model: nn.Module) -> Tensor:
        """The tensor in `model`; a ValueError where the model no longer has it."""
        try:
            tensor = getattr(model.get_submodule(self.module), self.attribute)
        except AttributeError:
            tensor = None
        if not isinstance(tensor, Tensor):
            raise ValueError(f"model: it no longer has {self.name}; make a new pruner after changing the model")
        return tensor


@dataclass(frozen=True)
class NeuronSlices:
    """A stored tensor that has slices of each neuron."""

    stored: StoredTensor
    layout: Layout

    def tensor(self, model: nn.Module, group: NeuronGroup, *, role: str = "model") -> Tensor:
        """The tensor in `model`, which messages call `role`; its shape must have the width of `group`."""
        tensor, axis = self.stored.of(model), self.layout.axis
        if tensor.dim() <= axis or tensor.shape[axis] != group.width * self.layout.entries:
            raise ValueError(
                f"{role}: {self.stored.name} was traced with {count_neurons(group.width)} of {group.name} along "
                f"dimension {axis} and now has shape {tuple(tensor.shape)}; make a new pruner after changing the model"
            )
        return tensor


@dataclass(frozen=True)
class NeuronCount:
    """A module attribute that holds the number of neurons, multiplied by `entries`."""

    module: str
    attribute: str
    entries: int = 1


@dataclass(frozen=True)
class Reader:
    """A Linear layer or convolution that reads the neurons.

    `shift` can absorb the mean contribution of removed neurons: it is the layer's own bias, or the running mean of the
    BatchNorm behind a layer without bias, or None where there is neither.
    """

    module: str
    layout: Layout  # of the neurons along dimension 1 of its weight
    shift: StoredTensor | None
    padded: bool = False  # True for a convolution with zero padding

    @property
    def weight(self) -> StoredTensor:
        """Its (outputs, neurons · entries, ...) weight."""
        return StoredTensor(self.module, "weight")


@dataclass(frozen=True)
class NeuronGroup:
    """The neurons of one layer, or of several layers whose outputs are multiplied, and everything that belongs to them.

    `producers` are all layers that compute the neurons, in the order of the forward pass; `name` is the first of them.
    All readers read the same value. It is observed before the `dropouts`, nn.Dropout modules in front of a reader.
    """

    name: str
    producers: tuple[str, ...]
    width: int
    slices: tuple[NeuronSlices, ...]
    counts: tuple[NeuronCount, ...]
    readers: tuple[Reader, ...]
    value: Layout  # of the neurons in the value that the readers read
    dimensions: int  # of that value
    dropouts: tuple[str, ...] = field(compare=False)

    @property
    def positions(self) -> int | None:
        """Number of entries of a neuron that the readers weight separately, as behind a flatten; None for one entry."""
        return self.value.entries if self.value.entries > 1 else None

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules whose outputs are the neurons: producers, norms, depthwise convolutions."""
        readers = {reader.module for reader in self.readers}
        return frozenset(slices.stored.module for slices in self.slices) - (readers - set(self.producers))


def all_but(neurons: Tensor, width: int) -> Tensor:
    """The other indices below `width`, ascending int64 on the CPU; `neurons` may come in any order."""
    others = torch.ones(width, dtype=torch.bool, device="cpu")
    others[neurons] = False
    return others.nonzero().flatten()


def count_neurons(count: int) -> str:
    return f"{count} neuron{'' if count == 1 else 's'}"
