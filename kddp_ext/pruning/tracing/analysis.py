"""Collects the prunable neurons from the labels of a model's forward passes.

The labels of both modes' forward passes say which entries of which tensors go together. A class of entries is a neuron
if a layer writes it, a layer reads it, and nothing freezes it. Neurons that a layer writes together are a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kddp_ext import ops
from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.tracing.flow import NeuronFlow, Read
from kddp_ext.pruning.tracing.labels import Labels
from kddp_ext.pruning.tracing.operations.table import follow
from kddp_ext.pruning.tracing.recording import ModuleCall, Operation, Recording
from kddp_ext.pruning.tracing.structure import (
    NeuronCount,
    NeuronGroup,
    PrunableNeurons,
    Reader,
    ReadValue,
    StoredTensor,
)

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# A constant added to a channel passes unchanged through a maximum, and through a mean without padding.
_SHIFT_PASSES = ("max_pool", "adaptive_max_pool", "adaptive_avg_pool", "_adaptive_avg_pool")


@dataclass(frozen=True, eq=False)
class _Observed:
    """A read and the module call whose first argument, in its present version, is what it reads.

    The neurons lie in the argument as `layout` tells; `units` are the labels of the layout's units.
    """

    read: Read
    call: ModuleCall
    argument: Tensor
    version: int
    layout: Layout
    units: Tensor


class Analysis:
    """The neurons that the labels of some recordings tell, with one choice for each kind of ambiguous operation.

    Args:
        model: the traced model.
        recordings: of its forward pass in training and in evaluation mode.
        choices: as `NeuronFlow` takes them.
        keep_norm_statistics: freeze neurons that are normalised together.
        ties: pairs of labels of stored tensors that are equal, though no operation tells.
    """

    def __init__(
        self,
        model: nn.Module,
        recordings: Sequence[Recording],
        choices: dict[Hashable, int],
        *,
        keep_norm_statistics: bool,
        ties: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.model = model
        self.labels = Labels()
        self.axes = self._stored_labels(recordings)
        self.flows = [NeuronFlow(model, each, self.labels, choices, keep_norm_statistics) for each in recordings]
        for flow in self.flows:
            follow(flow)
        for tie in ties:
            self.labels.unite(*tie, "")
        self._reads = self._observed_reads()
        self._classes, self._reasons = self.labels.classes()
        self._groups, self._neuron_of = self._numbered()

    def _stored_labels(self, recordings: Sequence[Recording]) -> dict[StoredTensor, list[Tensor | None]]:
        """Labels of the dimensions of all stored tensors, which both recordings share."""
        axes: dict[StoredTensor, list[Tensor | None]] = {}
        for recording in recordings:
            for fake in recording.fakes:
                stored = recording.stored[id(fake)]
                if stored not in axes:
                    axes[stored] = [self.labels.new(size) for size in fake.shape]
                    if isinstance(self.model.get_submodule(stored.module), nn.modules.conv._ConvNd):
                        axes[stored][2:] = [None] * (fake.dim() - 2)  # a filter's positions cannot be removed
                    reason = _unsliceable(self.model, stored, self._holders)
                    if reason is not None:
                        for labels in axes[stored]:
                            self.labels.freeze(labels, reason)
                self.labels.set(fake, axes[stored])
        self.labels.stored = self.labels.number
        return axes

    @cached_property
    def _holders(self) -> dict[tuple[torch.device, int], set[int]]:
        """The ids of all stored tensors by their memory."""
        holders: dict[tuple[torch.device, int], set[int]] = defaultdict(set)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel():
                holders[ops.storage_key(tensor)].add(id(tensor))
        return holders

    # --- Who reads the neurons

    def _observed_reads(self) -> list[list[_Observed]]:
        """For each weight that reads neurons in the training pass, its reads, whose values can all be observed.

        What the other weights read is frozen.
        """
        training, evaluation = self.flows
        reads, others = _by_weight(training.reads), _by_weight(evaluation.reads)
        observed = []
        for weight, of_weight in reads.items():
            found = [self._observed(training, read) for read in of_weight]
            reason = next((each for each in found if isinstance(each, str)), None)
            seen = [each for each in found if not isinstance(each, str)]
            if reason is None and not self._alike(seen, len(others.get(weight, of_weight))):
                reason = (
                    f"{weight.name} reads them {len(seen)} times in one forward pass, which differ in shape or place, "
                    "or by the mode; use a separate module for each"
                )
            if reason is None:
                observed.append(seen)
            else:
                self._freeze_reads(of_weight, reason)
        for weight, of_weight in others.items():
            if weight not in reads:
                self._freeze_reads(of_weight, f"{weight.name} reads them in evaluation mode only")
        return observed

    def _freeze_reads(self, reads: Sequence[Read], reason: str) -> None:
        for read in reads:
            self.labels.freeze(self.labels.of(read.value)[read.value_axis], reason)

    def _alike(self, seen: Sequence[_Observed], in_evaluation: int) -> bool:
        """Whether the reads of one weight are one, or as many as the calls of their module and in the same way."""
        if len(seen) == 1:
            return True
        calls = [call for call in self.flows[0].recording.calls if call.module == seen[0].call.module]
        shapes = {(each.layout, each.argument.dim(), len(each.argument)) for each in seen}
        same_calls = list(map(id, calls)) == [id(each.call) for each in seen]
        return in_evaluation == len(seen) and same_calls and len(shapes) == 1

    def _observed(self, flow: NeuronFlow, read: Read) -> _Observed | str:
        """The module call whose first argument is the value, and that argument's dimension; or why there is none."""
        call = read.operation.call
        if call.input is None or not (
            self._holds(call.module, read.weight) or _is_only_use(flow, call, call.input[0], read.operation)
        ):
            return f"{flow.place(read.operation)} reads them by a function call with {read.weight.name}; use a module"
        value: Tensor | None = read.value
        while value is not None and value is not call.input[0]:
            value = flow.moved.get(id(value))
        labels = self.labels.of(read.value)[read.value_axis]
        for axis, each in enumerate([] if value is None else self.labels.of(value)):
            if each is not None and labels is not None and axis and torch.equal(each, labels):
                return _Observed(read, call, call.input[0], call.input[1], *_layout(each, axis))
        if value is not None and value.dim() < 2:
            return f"{call.module} is called on a single sample without a batch dimension"
        return f"{call.module} computes with something else than its first argument"

    def _holds(self, module: str, weight: StoredTensor) -> bool:
        """Whether a module holds a stored tensor; a tied one has the name of its first module."""
        tensor = weight.of(self.model)
        return any(each is tensor for each in self.model.get_submodule(module)._parameters.values())

    # --- The neurons

    def _numbered(self) -> tuple[tuple[NeuronGroup, ...], Tensor]:
        """The groups, and the number of each label's neuron, (labels,) int64, or -1."""
        classes = self._classes
        read = torch.zeros(self.labels.number, dtype=torch.bool, device="cpu")
        for each in self._reads:
            read[classes[each[0].units]] = True
        open_ = read & torch.tensor([reason is None for reason in self._reasons], dtype=torch.bool, device="cpu")
        members: dict[int, tuple[list[str], list[int]]] = {}  # producers and classes of each group
        owner: dict[int, int] = {}  # by class, the key of its group; a new group takes the number of classes so far
        for name, labels in self.flows[0].writes:
            mine = classes[labels]
            if labels.numel() > 1 and bool((mine == mine[0]).all()):  # all its outputs would go together
                continue
            written = list(dict.fromkeys(mine[open_[mine]].tolist()))
            if not written:
                continue
            first, *others = sorted({owner[each] for each in written if each in owner}) or [len(owner)]
            producers, together = members.setdefault(first, ([], []))
            for other in others:
                more_producers, more = members.pop(other)
                producers += more_producers
                together += more
                owner.update(dict.fromkeys(more, first))
            producers += [] if name in producers else [name]
            new = [each for each in written if each not in owner]
            together += new
            owner.update(dict.fromkeys(new, first))
        numbers, groups = torch.full((self.labels.number,), -1, device="cpu"), []
        start = 0
        for _, (producers, together) in sorted(members.items()):
            groups.append(NeuronGroup(producers[0], tuple(producers), start, len(together)))
            numbers[together] = torch.arange(start, start + len(together), device="cpu")
            start += len(together)
        return tuple(groups), numbers[classes] if self.labels.number else numbers

    @cached_property
    def neurons(self) -> PrunableNeurons:
        """Everything that belongs to the neurons."""
        slices: dict[StoredTensor, dict[int, Tensor]] = {}
        for stored, axes in self.axes.items():
            for axis, labels in enumerate(axes):
                numbers = self.numbers(labels)
                if numbers is not None:
                    slices.setdefault(stored, {})[axis] = numbers
        counts = {
            NeuronCount(*size) for flow in self.flows for size in flow.sizes if size[3] in slices.get(size[2], {})
        }
        values: list[ReadValue] = []
        indices: dict[tuple[object, ...], int] = {}
        readers = []
        for reads in self._reads:
            first, module, calls = reads[0], reads[0].call.module, len(reads)
            if self.numbers(first.units) is None:
                continue
            before = [self._before_dropouts(each.argument, each.version) for each in reads]
            if any(names != before[0][2] for *_, names in before):
                before = [(each.argument, each.version, ()) for each in reads]
            key = (first.layout.axis, *((id(value), version) for value, version, _ in before))
            if key not in indices:
                (value, _, dropouts), neurons = before[0], self._neuron_of[first.units]
                indices[key] = len(values)
                values.append(ReadValue(module, first.layout, value.dim(), neurons, dropouts, len(value), calls))
            read, shifts = first.read, {self._shift(each.read, module) for each in reads}
            shift = shifts.pop() if len(shifts) == 1 else None
            of_weight = read.weight, read.weight_axis, indices[key], shift, read.padded, read.groups, read.computed
            readers.append(Reader(module, *of_weight))
        shapes = {stored: tuple(stored.of(self.model).shape) for stored in slices}
        order = sorted(counts, key=lambda each: (each.module, each.attribute))
        norms = {norm.weight: norm for flow in self.flows for norm in flow.norms.values() if norm.weight in slices}
        return PrunableNeurons(
            self._groups, slices, tuple(order), tuple(values), tuple(readers), tuple(norms.values()), shapes
        )

    def numbers(self, labels: Tensor | None) -> Tensor | None:
        """The neurons of some labels; None where there is none."""
        if labels is None:
            return None
        numbers = self._neuron_of[labels]
        return numbers if bool((numbers >= 0).any()) else None

    def _before_dropouts(self, value: Tensor, version: int) -> tuple[Tensor, int, tuple[str, ...]]:
        """The value in front of the nn.Dropout modules that made `value`, its version, and their names."""
        names: list[str] = []
        while True:
            call = self._made_by.get((id(value), version))
            module = None if call is None else self.model.get_submodule(call.module)
            # An in-place dropout overwrites the value.
            if call is None or call.input is None or not isinstance(module, _DROPOUTS) or call.input[0] is value:
                return value, version, tuple(names)
            names.append(call.module)
            value, version = call.input

    @cached_property
    def _made_by(self) -> dict[tuple[int, int], ModuleCall]:
        """The innermost module call that returned each tensor of the training pass."""
        calls = self.flows[0].recording.calls
        made: dict[tuple[int, int], ModuleCall] = {}
        for call in calls:
            if call.output is not None:
                made.setdefault((id(call.output[0]), call.output[1]), call)
        return made

    def _shift(self, read: Read, module: str) -> StoredTensor | None:
        """The tensor that can absorb a constant added to the output of the reader `module`."""
        if read.computed:  # how much the removed neurons contribute is not known
            return None
        bias = read.weight.attribute.replace("weight", "bias")  # also in_proj_bias
        if self._holds(module, read.weight) and self.model.get_submodule(module)._parameters.get(bias) is not None:
            shift = StoredTensor(module, bias)
        else:
            norm = self._norm_behind(read.operation)
            stored = None if norm is None else self.flows[0].stored(norm.args[3])
            if stored is None:
                return None
            shift = stored
        return None if _unsliceable(self.model, shift, self._holders) else shift

    def _norm_behind(self, operation: Operation) -> Operation | None:
        """The BatchNorm that is the only user of the output of a reader, directly or through pooling."""
        while True:
            value = operation.outputs[0]
            users = self.flows[0].users.get(id(value), [])
            if len(users) != 1 or users[0].args[0] is not value:
                return None
            (operation,) = users
            if "batch_norm" in operation.name and isinstance(operation.args[3], Tensor):
                return operation
            is_global_mean = operation.name == "mean" and operation.args[0].dim() > 2
            if not operation.name.startswith(_SHIFT_PASSES) and not is_global_mean:
                return None

    # --- For the proof

    def gone(self, keep: Tensor) -> Tensor:
        """A mask of the labels whose neurons are not in `keep`, a (neurons,) mask."""
        if not keep.numel():
            return torch.zeros_like(self._neuron_of, dtype=torch.bool)
        return (self._neuron_of >= 0) & ~keep[self._neuron_of.clamp(min=0)]

    def tie(self, wide: NeuronGroup, narrow: NeuronGroup) -> tuple[Tensor, Tensor]:
        """Labels whose equality makes one neuron of each neuron of `narrow` and as many following ones of `wide`."""
        neurons = self._neuron_of[: self.labels.stored]
        held = (neurons >= 0).nonzero().flatten()
        first = torch.full((self.neurons.number,), self.labels.stored, device="cpu")
        first.scatter_reduce_(0, neurons[held], held, "amin")
        return first[wide.numbers], first[narrow.numbers].repeat_interleave(wide.width // narrow.width)

    def reaches(self, group: NeuronGroup, module: str) -> bool:
        """Whether an operation in a module, or in what it calls, gets neurons of a group."""
        mine = torch.zeros(self.neurons.number + 1, dtype=torch.bool, device="cpu")  # the last is for the number -1
        mine[group.numbers] = True
        return any(
            bool(mine[self._neuron_of[labels]].any())
            for flow in self.flows
            for operation in flow.recording.operations
            if any(call.module == module for call in operation.call.stack)
            for tensor in operation.inputs
            for labels in self.labels.of(tensor)
            if labels is not None
        )

    def followed(self, labels: Tensor) -> tuple[StoredTensor, int] | None:
        """A stored tensor's dimension that consists of the neurons with these labels."""
        numbers = self.numbers(labels)
        if numbers is None or bool((numbers < 0).any()):
            return None
        wanted = set(numbers.tolist())
        for stored, by_axis in self.neurons.slices.items():
            for axis, own in by_axis.items():
                if set(own.tolist()) == wanted:
                    return stored, axis
        return None

    # --- What was refused

    @cached_property
    def refused(self) -> dict[str, str]:
        """By the name of each layer that is not pruned, the reason."""
        reasons: dict[str, str] = {}
        producers = {name for group in self._groups for name in group.producers}
        for flow in self.flows:
            for name, labels in flow.writes:
                reasons.setdefault(name, self._reason(labels, "nothing reads its neurons"))
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and self.neurons.group_of(name) is None:
                reasons.setdefault(name, self._why_unwritten(name, module))
        return {name: reason for name, reason in reasons.items() if name not in producers}

    def _why_unwritten(self, name: str, module: nn.Module) -> str:
        """Why a layer is not pruned that writes no neurons of its own."""
        if module._parameters.get("weight") is None:  # parametrizations, and the masks of torch.nn.utils.prune
            return "its weight is computed in the forward pass, so it cannot be sliced"
        labels = next(iter(self.axes.get(StoredTensor(name, "weight"), [])), None)
        kind = "Linear layer" if isinstance(module, nn.Linear) else "convolution"
        return self._reason(labels, f"the forward pass does not reach it as a {kind}")

    def _reason(self, labels: Tensor | None, default: str) -> str:
        """The first reason why some of the labels are frozen."""
        found = [] if labels is None else [self._reasons[c] for c in self._classes[labels].tolist()]
        return next((each for each in found if each is not None), default)

    def removable(self, neurons: PrunableNeurons) -> float:
        """The number of parameters that go with half of the neurons of every group."""
        removed = 0.0
        goes = torch.zeros(neurons.number + 1, dtype=torch.bool, device="cpu")  # the last is for the number -1
        for group in neurons.groups:
            goes[group.numbers] = group.width > 1
        for stored, by_axis in neurons.slices.items():
            left = 1.0
            for numbers in by_axis.values():
                left *= 1 - float(goes[numbers].float().mean()) / 2
            removed += stored.of(self.model).numel() * (1 - left)
        return removed


def _is_only_use(flow: NeuronFlow, call: ModuleCall, value: Tensor, operation: Operation) -> bool:
    """Whether an operation alone uses a value in a module call, in another shape perhaps."""
    users = [user for user in flow.users[id(value)] if any(each is call for each in user.call.stack)]
    if len(users) != 1 or users[0] is operation:
        return len(users) == 1
    output = users[0].outputs[0]
    return flow.moved.get(id(output)) is value and _is_only_use(flow, call, output, operation)


def _by_weight(reads: Iterable[Read]) -> dict[StoredTensor, list[Read]]:
    """The reads by the weight that reads, in their order."""
    found: dict[StoredTensor, list[Read]] = defaultdict(list)
    for read in reads:
        found[read.weight].append(read)
    return found


def _layout(labels: Tensor, axis: int) -> tuple[Layout, Tensor]:
    """The layout of a dimension with these labels, and the label of each unit."""
    size = labels.numel()
    inner = int((labels != labels[0]).nonzero()[0]) if bool((labels != labels[0]).any()) else size
    if size % inner == 0 and bool((labels.view(-1, inner) == labels.view(-1, inner)[:, :1]).all()):
        runs = labels.view(-1, inner)[:, 0]
        again = (runs[1:] == runs[0]).nonzero().flatten()
        count = int(again[0]) + 1 if again.numel() else runs.numel()
        units = runs[:count]
        repeats = runs.numel() % count == 0 and torch.equal(units.repeat(runs.numel() // count), runs)
        if repeats and units.unique().numel() == count:
            return Layout(axis, runs.numel() // count, inner), units
    return Layout(axis), labels


def _unsliceable(
    model: nn.Module, stored: StoredTensor, holders: Mapping[tuple[torch.device, int], set[int]]
) -> str | None:
    """The reason why a stored tensor cannot be sliced."""
    tensor = stored.of(model)
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return f"{stored.name} is a {type(tensor).__name__}; only plain dense tensors can be sliced"
    if tensor.numel() and len(holders[ops.storage_key(tensor)]) > 1:
        return f"{stored.name} shares its memory with another parameter or buffer; give each its own"
    return None
