"""What the operations of a forward pass act on: the labels of neurons, and what is noted of the layers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from kddp_ext.pruning.tracing.labels import Axes, Labels, varying_axes
from kddp_ext.pruning.tracing.recording import Operation, Recording
from kddp_ext.pruning.tracing.structure import RootMeanSquareNorm, StoredTensor


@dataclass(frozen=True, eq=False)
class Read:
    """An operation that sums over the entries of one dimension of a value, weighted by a stored tensor.

    `computed`: weighted by what the forward pass computes from that tensor.
    """

    operation: Operation
    value: Tensor
    value_axis: int
    weight: StoredTensor
    weight_axis: int
    groups: int = 1
    padded: bool = False
    computed: bool = False


@dataclass(eq=False)
class NeuronFlow:
    """The labels as they flow through one recording.

    Attributes:
        choices: for each kind of operation that can keep neurons in several ways, the index of the way.
        options: the number of ways, for each kind that was met.
        proof_options: the same for kinds whose best way only the proof can tell.
        reads: operations that read neurons.
        writes: the name of each layer that writes neurons, and the labels of its outputs.
        applied: for each weight, at how many positions it is applied.
        origins: by the id of a tensor, the stored tensor that it is a view or copy of, or is computed from.
        computed: the ids of those that are computed, channel by channel, such as a standardised weight.
        moved: by the id of a tensor, the tensor whose entries it has in another order or shape.
        sizes: module attributes that follow the size of a stored tensor's dimension.
        norms: by the id of the operation that adds ε, the norms that divide neurons by their root mean square.
        sites: operations whose arguments are sizes, with the labels of a dimension that they make.
    """

    model: nn.Module
    recording: Recording
    labels: Labels
    choices: dict[Hashable, int]
    keep_norm_statistics: bool = True
    options: dict[Hashable, int] = field(default_factory=dict)
    proof_options: dict[Hashable, int] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    writes: list[tuple[str, Tensor]] = field(default_factory=list)
    applied: Counter[StoredTensor] = field(default_factory=Counter)
    origins: dict[int, StoredTensor] = field(default_factory=dict)
    computed: set[int] = field(default_factory=set)
    moved: dict[int, Tensor] = field(default_factory=dict)
    sizes: set[tuple[str, str, StoredTensor, int]] = field(default_factory=set)
    norms: dict[int, RootMeanSquareNorm] = field(default_factory=dict)
    sites: list[tuple[Operation, Tensor]] = field(default_factory=list)

    def place(self, operation: Operation) -> str:
        """The module that runs an operation, for messages: "act (GELU)"."""
        name, kind = operation.call.module, self.kind(operation)
        return f"{name} ({kind})" if name else f"the forward of {kind}"

    def kind(self, operation: Operation) -> str:
        """The name of the class of the innermost module that runs an operation."""
        return type(self.model.get_submodule(operation.call.module)).__name__

    def reason(self, operation: Operation, effect: str) -> str:
        """The reason of a refusal: what `operation` does to the neurons."""
        return f"{operation.title} in {self.place(operation)} {effect}"

    def choose(
        self, operation: Operation, labels: Tensor | None, what: Hashable, options: int, *, by_proof: bool = False
    ) -> int:
        """Which of several ways to keep neurons is tried at `operation`; alike operations choose alike."""
        if labels is not None and int(labels.min()) >= self.labels.stored:
            return 0  # the forward pass makes the tensor, such as a mask
        kind = (operation.name, self.kind(operation), what)
        (self.proof_options if by_proof else self.options)[kind] = options
        return self.choices.get(kind, 0)

    def stored(self, tensor: Any) -> StoredTensor | None:
        """The stored tensor that `tensor` is a view or a copy of, or is computed from."""
        return self.origins.get(id(tensor))

    def move(self, source: Tensor, result: Tensor) -> None:
        """Note that `result` has the entries of `source`."""
        self.moved[id(result)] = source
        if id(source) in self.origins:
            self.origins[id(result)] = self.origins[id(source)]
        if id(source) in self.computed:
            self.computed.add(id(result))

    def holder(self, operation: Operation, stored: StoredTensor) -> str:
        """The module that holds a stored tensor: that which runs `operation`, if it is among them."""
        name = operation.call.module
        return name if name in self._modules[id(stored.of(self.model))] else stored.module

    def write(self, operation: Operation, stored: StoredTensor, labels: Tensor) -> None:
        """Note that `operation` writes neurons with the weight `stored`."""
        holder = self.holder(operation, stored)
        producer = holder if stored.attribute == "weight" else f"{holder}.{stored.attribute}" if holder else stored.name
        self.writes.append((producer, labels))

    def set_size(self, stored: StoredTensor | None, axis: int, *attributes: str) -> None:
        """Note that these attributes, where the modules that hold `stored` have them, follow its dimension."""
        if stored is None:
            return
        for module in self._modules[id(stored.of(self.model))]:
            held = self.model.get_submodule(module)
            self.sizes.update((module, each, stored, axis) for each in attributes if hasattr(held, each))

    @cached_property
    def users(self) -> dict[int, list[Operation]]:
        """By the id of a tensor, the operations that read it, if the model uses what they return."""
        users: dict[int, list[Operation]] = defaultdict(list)
        for operation, is_used in zip(self.recording.operations, used_operations(self.recording), strict=True):
            for tensor in {id(each): each for each in operation.inputs} if is_used else ():
                users[tensor].append(operation)
        return users

    @cached_property
    def makers(self) -> dict[int, Operation]:
        """By the id of a tensor, the operation that made it."""
        made = reversed(self.recording.operations)
        return {id(output): operation for operation in made for output in operation.outputs}

    @cached_property
    def stored_axes(self) -> dict[StoredTensor, Axes]:
        """The labels of each stored tensor."""
        return {self.recording.stored[id(fake)]: self.labels.of(fake) for fake in self.recording.fakes}

    @cached_property
    def _modules(self) -> dict[int, list[str]]:
        """By the id of each parameter and buffer, the modules that hold it; a tied one has several."""
        modules: dict[int, list[str]] = defaultdict(list)
        for name, module in self.model.named_modules():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                modules[id(tensor)].append(name)
        return modules

    def factored(self, operation: Operation, labels: Tensor, what: Hashable) -> Axes:
        """Labels of every entry as labels of dimensions.

        Where they differ along several dimensions, as after a split of q into heads, one dimension is chosen; entries
        with the same index along it become one neuron.
        """
        axes: Axes = [None] * labels.dim()
        varying = varying_axes(labels)
        if len(varying) > 1:
            # The last of several is most often the size of a head, and the first of three the choice of q, k and v.
            order = sorted(varying, key=lambda axis: (axis != varying[-2], axis))
            chosen = order[self.choose(operation, labels, what, len(order))]
            rows = labels.permute([axis for axis in range(labels.dim()) if axis not in varying] + [
                *(axis for axis in varying if axis != chosen), chosen])  # fmt: skip
            rows = rows[(0,) * (labels.dim() - len(varying))].reshape(-1, labels.shape[chosen])
            axes[chosen] = self.labels.unite_rows(rows).clone()
        elif varying:
            axes[varying[0]] = labels.movedim(varying[0], -1)[(0,) * (labels.dim() - 1)].clone()
        elif labels.numel():
            self.labels.freeze(labels.flatten()[:1], self.reason(operation, "takes a single entry of them"))
        return axes

    def without(self, operation: Operation, dims: Iterable[int], effect: str | None) -> Axes:
        """The labels of the first argument without those along `dims`, which are frozen for an `effect` on them."""
        axes = list(self.labels.of(operation.args[0]))
        for axis in dims:
            if effect is not None:
                self.labels.freeze(axes[axis], self.reason(operation, effect))
            axes[axis] = None
        return axes

    def foreign_operand(self, operation: Operation) -> str:
        """The reason of a refusal where another operand of `operation` cannot be narrowed."""
        effect = {
            "mul": "multiplies them by a tensor that cannot be narrowed",
            "add": "adds a tensor to them that cannot be narrowed",
        }.get(operation.name, "combines them with a tensor that cannot be narrowed")
        return self.reason(operation, effect)


def used_operations(recording: Recording) -> list[bool]:
    """Whether the outputs of the model depend on each operation; those in place always count."""
    needed = {id(output) for output in recording.outputs}
    used = []
    for operation in reversed(recording.operations):
        used.append(operation.target._schema.is_mutable or any(id(output) in needed for output in operation.outputs))
        if used[-1]:
            needed.update(map(id, operation.inputs))
    return used[::-1]
