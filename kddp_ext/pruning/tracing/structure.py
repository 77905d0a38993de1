"""Which entries of which tensors belong to each prunable neuron of a model, and who reads the neurons.

All neurons of a model are numbered. A sliced dimension of a stored tensor has a vector of these numbers, one for each
entry, with -1 where an entry belongs to no prunable neuron. So removing neurons from a tensor is one selection, however
many layers write and read the neurons, and at whatever offsets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.activations.layout import Layout

_NO_UNITS = torch.empty(0, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer, named by the module that holds it."""

    module: str
    attribute: str

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
class NeuronGroup:
    """The neurons of a layer, or of several layers that write the same neurons, such as those of a residual stream.

    `producers` are the layers that write them, in the order of the forward pass; `name` is the first of them. The
    group has the numbers from `start` on.
    """

    name: str
    producers: tuple[str, ...]
    start: int
    width: int

    @property
    def numbers(self) -> slice:
        """The numbers of its neurons."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True)
class NeuronCount:
    """A module attribute that is proportional to the size of a stored tensor's dimension, such as `out_features`."""

    module: str
    attribute: str
    stored: StoredTensor
    axis: int


@dataclass(frozen=True)
class RootMeanSquareNorm:
    """A norm that divides entries by the root of their mean square: w · x / √(mean(x²) + ε), with w = weight + offset.

    Removing entries that are zero divides the mean of D entries by D'/D, for the D' that stay. So w·√(D/D') and ε·D/D'
    compute the same.
    """

    module: str
    attribute: str  # of the module: ε, or None for the resolution of the weight's dtype
    weight: StoredTensor
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class ReadValue:
    """A value that layers read, observed as the first argument of `module`, before the `dropouts` in front of it.

    Its dimension `layout.axis` has outer · units · inner entries. A unit is a neuron, or a part of one where a neuron
    has several entries that do not follow a pattern. `neurons` are the numbers of the units' neurons, (units,) int64.
    `rows` is the size of its first dimension in the trace. A shared module has several `calls` in a forward pass, each
    with a value of its own and this layout.
    """

    module: str
    layout: Layout
    dimensions: int
    neurons: Tensor
    dropouts: tuple[str, ...] = ()
    rows: int = 1
    calls: int = 1

    @property
    def units(self) -> int:
        return self.neurons.numel()

    @property
    def positions(self) -> int | None:
        """Number of entries of a unit that the readers weight separately, as behind a flatten; None for one entry."""
        return self.layout.entries if self.layout.entries > 1 else None


@dataclass(frozen=True)
class Reader:
    """A layer whose output is a weighted sum over the neurons of a value.

    `shift` can absorb the mean contribution of removed neurons: it is the layer's own bias, or the running mean of the
    BatchNorm behind a layer without bias, or None where there is neither. `computed` tells that the layer's weight is
    computed from `weight` in the forward pass, as by weight standardisation. So nothing can be added to the weight.
    """

    module: str
    weight: StoredTensor
    axis: int  # of the weight, along which it reads
    value: int  # its index among the values
    shift: StoredTensor | None
    padded: bool = False  # True for a convolution with zero padding
    groups: int = 1  # of a convolution; each reads its own part of the value
    computed: bool = False


@dataclass(frozen=True, eq=False)
class PrunableNeurons:
    """Everything that belongs to the neurons of some groups of a model."""

    groups: tuple[NeuronGroup, ...]
    slices: Mapping[StoredTensor, Mapping[int, Tensor]]  # by tensor and dimension: the numbers of its entries
    counts: tuple[NeuronCount, ...] = ()
    values: tuple[ReadValue, ...] = ()
    readers: tuple[Reader, ...] = ()
    norms: tuple[RootMeanSquareNorm, ...] = ()
    shapes: Mapping[StoredTensor, tuple[int, ...]] = field(default_factory=dict)  # of the tensors of `slices`

    @property
    def number(self) -> int:
        """How many neurons there are."""
        return sum(group.width for group in self.groups)

    def same(self, other: PrunableNeurons) -> bool:
        """Whether both have the same entries of the same tensors for each neuron."""
        return self.slices.keys() == other.slices.keys() and all(
            by_axis.keys() == other.slices[stored].keys()
            and all(torch.equal(numbers, other.slices[stored][axis]) for axis, numbers in by_axis.items())
            for stored, by_axis in self.slices.items()
        )

    def units_of(self, value: int, group: NeuronGroup) -> tuple[Tensor, Tensor]:
        """The units of a value, by its index, that belong to a group; and the indices of their neurons in the group."""
        return self._units[value].get(group.name, (_NO_UNITS, _NO_UNITS))

    @cached_property
    def _units(self) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """For each value what `units_of` returns for each group that it has neurons of, by the group's name."""
        widths = torch.tensor([group.width for group in self.groups], dtype=torch.int64, device="cpu")
        group_of_neuron = torch.arange(len(self.groups), device="cpu").repeat_interleave(widths)
        found = list[dict[str, tuple[Tensor, Tensor]]]()
        for value in self.values:
            read = (value.neurons >= 0).nonzero().flatten()
            owners = group_of_neuron[value.neurons[read]]
            found.append({})
            for owner in owners.unique().tolist():
                group, units = self.groups[owner], read[owners == owner]
                found[-1][group.name] = units, value.neurons[units] - group.start
        return found

    @cached_property
    def value_names(self) -> tuple[str, ...]:
        """A name for each value: its layer's, or "reader.input" where other values have that layer's neurons too."""
        values_of = Counter(name for units in self._units for name in units)
        alone = [len(units) == 1 and values_of[next(iter(units))] == 1 for units in self._units]
        return tuple(
            next(iter(units)) if is_alone else f"{value.module}.input"
            for value, units, is_alone in zip(self.values, self._units, alone, strict=True)
        )

    def group_of(self, module: str) -> NeuronGroup | None:
        """The group whose neurons a module's tensors have along their first dimension, as those of a BatchNorm have."""
        for stored, by_axis in self.slices.items():
            if stored.module == module and 0 in by_axis:
                first = int(by_axis[0].max())
                return next(each for each in self.groups if first < each.start + each.width)
        return None

    def readers_of(self, group: NeuronGroup) -> tuple[Reader, ...]:
        """The layers that read a neuron of `group`."""
        return tuple(each for each in self.readers if group.name in self._units[each.value])

    def tensors(self, model: nn.Module, *, role: str = "model") -> dict[StoredTensor, Tensor]:
        """The sliced tensors in `model`, which messages call `role`; their shapes must be those of the trace."""
        found = {stored: stored.of(model) for stored in self.slices}
        for stored, tensor in found.items():
            if tuple(tensor.shape) != self.shapes[stored]:
                raise ValueError(
                    f"{role}: {stored.name} was traced with shape {self.shapes[stored]} and now has shape "
                    f"{tuple(tensor.shape)}; make a new pruner after changing the model"
                )
        return found

    def entries_kept(self, stored: StoredTensor, keep: Tensor) -> dict[int, Tensor]:
        """By dimension, the ascending entries of a sliced tensor that stay with the neurons `keep`, a (number,) mask.

        Dimensions that lose nothing are left out.
        """
        kept = {axis: _stays(numbers, keep) for axis, numbers in self.slices[stored].items()}
        return {axis: stays.nonzero().flatten() for axis, stays in kept.items() if not bool(stays.all())}

    def shape_after(self, stored: StoredTensor, keep: Tensor) -> tuple[int, ...]:
        """The shape of a stored tensor with the neurons `keep` alone."""
        shape = list(self.shapes[stored])
        for axis, numbers in self.slices[stored].items():
            shape[axis] = int(_stays(numbers, keep).sum())
        return tuple(shape)

    def count_after(self, count: NeuronCount, value: int | tuple[int, ...], keep: Tensor) -> int | tuple[int, ...]:
        """What the attribute `count` of a module, now `value`, becomes with the neurons `keep` alone.

        A tuple is a shape, such as a `normalized_shape`; one of its dimensions follows the neurons.
        """
        before = self.shapes[count.stored][count.axis]
        after = int(_stays(self.slices[count.stored][count.axis], keep).sum())
        if isinstance(value, tuple):
            return tuple(after if each == before else each for each in value)
        return value * after // before

    def attributes_after(self, model: nn.Module, keep: Tensor) -> list[tuple[nn.Module, str, Any]]:
        """The attributes of the modules of `model` that change with the neurons `keep` alone, and their new values."""
        counted = [(model.get_submodule(each.module), each) for each in self.counts]
        return [
            *((module, each.attribute, self.count_after(each, getattr(module, each.attribute), keep))
              for module, each in counted),
            *((model.get_submodule(each.module), each.attribute, self.epsilon_after(each, model, keep))
              for each in self.norms),
        ]  # fmt: skip

    def narrowing(self, norm: RootMeanSquareNorm, keep: Tensor) -> float:
        """D/D' of a norm with the neurons `keep` alone."""
        return self.shapes[norm.weight][0] / self.shape_after(norm.weight, keep)[0]

    def epsilon_after(self, norm: RootMeanSquareNorm, model: nn.Module, keep: Tensor) -> float:
        """The ε of a norm in `model` with the neurons `keep` alone."""
        before = getattr(model.get_submodule(norm.module), norm.attribute)
        epsilon = torch.finfo(norm.weight.of(model).dtype).eps if before is None else float(before)
        return epsilon * self.narrowing(norm, keep)

    def only(self, groups: Sequence[NeuronGroup]) -> PrunableNeurons:
        """The same with some of the groups alone; the neurons of the others stay."""
        chosen = torch.zeros(self.number, dtype=torch.bool, device="cpu")
        for group in groups:
            chosen[group.numbers] = True
        part = self._renumbered(groups, chosen, torch.ones_like(chosen))
        slices = {stored: {axis: each for axis, each in by_axis.items() if bool((each >= 0).any())}
                  for stored, by_axis in part.slices.items()}  # fmt: skip
        slices = {stored: by_axis for stored, by_axis in slices.items() if by_axis}
        read = [index for index, value in enumerate(part.values) if bool((value.neurons >= 0).any())]
        return replace(
            part,
            slices=slices,
            counts=tuple(each for each in part.counts if each.axis in slices.get(each.stored, {})),
            norms=tuple(each for each in part.norms if each.weight in slices),
            values=tuple(part.values[index] for index in read),
            readers=tuple(replace(each, value=read.index(each.value)) for each in part.readers if each.value in read),
            shapes={stored: self.shapes[stored] for stored in slices},
        )

    def after(self, keep: Tensor) -> PrunableNeurons:
        """What remains when the neurons `keep`, a (number,) mask, stay."""
        groups = [replace(group, width=int(keep[group.numbers].sum())) for group in self.groups]
        return self._renumbered(groups, keep, keep)

    def _renumbered(self, groups: Sequence[NeuronGroup], prunable: Tensor, keep: Tensor) -> PrunableNeurons:
        """Number the `prunable` neurons, those of `groups`, anew, and drop the entries of those not in `keep`."""
        starts = accumulate((group.width for group in groups), initial=0)
        groups = tuple(replace(group, start=start) for group, start in zip(groups, starts, strict=False))
        numbers = torch.where(prunable, prunable.cumsum(0) - 1, -1)

        def renumber(old: Tensor) -> Tensor:
            old = old[_stays(old, keep)]
            return torch.where(old >= 0, numbers[old.clamp(min=0)], -1)

        slices = {
            stored: {axis: renumber(old) for axis, old in by_axis.items()} for stored, by_axis in self.slices.items()
        }
        shapes = {stored: self.shape_after(stored, keep) for stored in self.slices}
        values = [replace(value, neurons=renumber(value.neurons)) for value in self.values]
        return replace(self, groups=groups, slices=slices, shapes=shapes, values=tuple(values))


def _stays(numbers: Tensor, keep: Tensor) -> Tensor:
    """A mask of the entries whose neuron stays or that belong to none."""
    return torch.cat([keep, keep.new_ones(1)])[numbers]  # the number -1 is the last


def count_neurons(count: int) -> str:
    return f"{count} neuron{'' if count == 1 else 's'}"
