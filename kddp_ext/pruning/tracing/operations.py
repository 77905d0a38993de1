"""What each aten operation does to the labels of the tensors that it reads.

An operation that only moves entries is run on the labels themselves. An elementwise operation makes labels equal. The
others have a handler each; an operation without one freezes everything that it reads.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.tracing.labels import Axes, Labels, along, varying_axes
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

    def run(self) -> None:
        """Follow all operations, and freeze what the model returns."""
        for fake in self.recording.fakes:
            self.origins[id(fake)] = self.recording.stored[id(fake)]
        used = _used(self.recording)
        for operation, is_used in zip(self.recording.operations, used, strict=True):
            self.labels.is_used = is_used
            labelled = any(label is not None for each in operation.inputs for label in self.labels.of(each))
            if not labelled and operation.name not in (*FACTORIES, *LAYERS):
                continue
            handler = HANDLERS.get(operation.name)
            if handler is None and torch.Tag.pointwise in operation.target.tags:
                handler = _pointwise
            if handler is None:
                self.labels.freeze_all(
                    operation.inputs,
                    f"the pruner does not know whether the operation {operation.title} in {self.place(operation)} "
                    "keeps neurons separate; leave this layer unpruned or move the operation behind the next layer",
                )
                continue
            handler(self, operation)
        self.labels.is_used = True
        for output in self.recording.outputs:
            if not self.keep_norm_statistics and id(output) in self.recording.additional:
                continue
            for labels in self.labels.of(output):
                self.labels.freeze(labels, "its neurons are outputs of the model", foremost=True)

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
        for operation, is_used in zip(self.recording.operations, _used(self.recording), strict=True):
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


def _used(recording: Recording) -> list[bool]:
    """Whether the outputs of the model depend on each operation; those in place always count."""
    needed = {id(output) for output in recording.outputs}
    used = []
    for operation in reversed(recording.operations):
        used.append(operation.target._schema.is_mutable or any(id(output) in needed for output in operation.outputs))
        if used[-1]:
            needed.update(map(id, operation.inputs))
    return used[::-1]


# --- Operations that move entries


def _movement(flow: NeuronFlow, operation: Operation) -> None:
    """view, permute, select and similar: run on the labels of each dimension."""
    source, of_source = operation.args[0], flow.labels.of(operation.args[0])
    labelled = [axis for axis, each in enumerate(of_source) if each is not None]
    labelled.sort(key=lambda axis: source.shape[axis] == 1)
    results = [_moved(flow, operation, axis) for axis in labelled]
    if operation.name in _PARTS:  # the size of a part may be computed from that of the whole
        flow.sites += [(operation, labels) for labels in of_source if labels is not None]
    for index, output in enumerate(operation.outputs):
        axes: Axes = [None] * output.dim()
        for source_axis, result in zip(labelled, results, strict=True):
            for axis, labels in enumerate(result[index]):
                if labels is not None and operation.name in SIZED:
                    flow.sites.append((operation, labels))
                if labels is not None and axes[axis] is not None and source.shape[source_axis] == 1:
                    flow.labels.freeze(labels, "a single entry is never removed")
                    continue
                if labels is not None and axes[axis] is not None:
                    for each in (axes[axis], labels):
                        flow.labels.freeze(each, flow.reason(operation, "merges two dimensions of neurons"))
                    labels = None
                axes[axis] = labels if axes[axis] is None else axes[axis]
        flow.labels.set(output, axes)
        flow.move(source, output)


def _moved(flow: NeuronFlow, operation: Operation, axis: int) -> list[Axes]:
    """The labels of the outputs that come from dimension `axis` of the input."""
    source, labels = operation.args[0], flow.labels.of(operation.args[0])[axis]
    assert labels is not None
    if operation.name in _PARTS:
        return _parts(flow, operation, axis, labels)
    if labels.numel() == 1:
        return [_moved_single(operation, axis, labels)]
    entries = along(labels, axis, source.shape)
    if operation.name in ("view", "_unsafe_view", "reshape"):
        result = entries.reshape(operation.outputs[0].shape)
    else:
        result = operation.target(entries, *operation.args[1:], **operation.kwargs)
    what = (tuple(source.shape[1:]), axis)
    return [flow.factored(operation, each, what) for each in (result if isinstance(result, list | tuple) else [result])]


def _moved_single(operation: Operation, axis: int, labels: Tensor) -> Axes:
    """The label of a single entry, which constant labels do not show; it is lost where its dimension is not clear."""
    source, output = operation.args[0], operation.outputs[0]
    axes: Axes = [None] * output.dim()
    if operation.name in ("permute", "transpose", "t"):
        marked = source.new_empty(
            [7919 if each == axis else size for each, size in enumerate(source.shape)], device="meta"
        )
        axes[operation.target(marked, *operation.args[1:]).shape.index(7919)] = labels
        return axes
    layout = Layout(axis).reshaped(source.shape, output.shape)
    if layout is not None:
        axes[layout.axis] = labels.expand(output.shape[layout.axis])
    return axes


def _parts(flow: NeuronFlow, operation: Operation, axis: int, labels: Tensor) -> list[Axes]:
    """slice, select, split and unbind along a dimension of neurons, whose bounds depend on the number of neurons."""
    source, dim = operation.args[0], operation.argument("dim", 0) % operation.args[0].dim()
    others: list[Axes] = [[None] * each.dim() for each in operation.outputs]
    if dim != axis:
        lost = operation.name in ("select", "unbind") and dim < axis
        for each in others:
            each[axis - lost] = labels
        return others
    size, sizes = source.shape[dim], [each.shape[dim] for each in operation.outputs if each.dim() == source.dim()]
    if operation.name in ("select", "unbind"):
        flow.labels.freeze(labels, flow.reason(operation, "takes single entries of them"))
    elif operation.name == "slice":
        start, end, step = slice(*(operation.argument(name) for name in ("start", "end", "step"))).indices(size)
        if (start, end, step) == (0, size, 1):
            others[0][dim] = labels
            return others
        equal = sizes[0] and size % sizes[0] == 0 and start % sizes[0] == 0
        way = flow.choose(operation, labels, "bounds", 3, by_proof=True)
        if step == 1 and equal and way == 0:  # one of several parts that keep equal sizes
            others[0][dim] = flow.labels.unite_rows(labels.view(-1, sizes[0]))
            return others
        if step != 1:
            flow.labels.freeze(labels, flow.reason(operation, "takes every second of them, or fewer"))
        elif way == 2:
            reason = flow.reason(operation, "cuts them at a fixed index")
            flow.labels.freeze(labels[: start if end == size else end], reason)
        others[0][dim] = labels[start:end:step]  # the proof compares the bounds
    elif len(set(sizes)) == 1:  # equal parts keep equal sizes
        first = flow.labels.unite_rows(labels.view(len(sizes), -1))
        for each in others:
            each[dim] = first
    else:
        for each, part in zip(others, labels.split(sizes), strict=True):
            each[dim] = part
    return others


def _expand(flow: NeuronFlow, operation: Operation) -> None:
    """Dimensions of one entry are repeated: what is new cannot be removed."""
    (output,), source = operation.outputs, operation.args[0]
    axes = flow.labels.of(source)
    flow.labels.set(output, [None] * (output.dim() - source.dim()) + axes)
    flow.move(source, output)


def _without(flow: NeuronFlow, operation: Operation, dims: Iterable[int], effect: str | None) -> Axes:
    """The labels of the first argument without those along `dims`, which are frozen for an `effect` on the neurons."""
    axes = list(flow.labels.of(operation.args[0]))
    for axis in dims:
        if effect is not None:
            flow.labels.freeze(axes[axis], flow.reason(operation, effect))
        axes[axis] = None
    return axes


def _roll(flow: NeuronFlow, operation: Operation) -> None:
    """A shift around the end, which another number of neurons would change."""
    dims = operation.argument("dims") or range(operation.args[0].dim())
    flow.labels.set(operation.outputs[0], _without(flow, operation, dims, "shifts them"))


def _channel_shuffle(flow: NeuronFlow, operation: Operation) -> None:
    """Channel j of group g becomes channel j · groups + g; equally many channels of each group are removed."""
    axes, groups = list(flow.labels.of(operation.args[0])), operation.args[1]
    if axes[1] is not None:
        axes[1] = flow.labels.unite_rows(axes[1].view(groups, -1)).repeat_interleave(groups)
    flow.labels.set(operation.outputs[0], axes)


def _strided(flow: NeuronFlow, operation: Operation) -> None:
    """as_strided with the shape of its argument, which PyTorch uses to change a memory format."""
    (output,), source = operation.outputs, operation.args[0]
    if output.shape == source.shape:
        flow.labels.set(output, flow.labels.of(source))
    else:
        flow.labels.freeze_all([source], flow.reason(operation, "rearranges them"))


def _concatenation(flow: NeuronFlow, operation: Operation) -> None:
    """The labels along the dimension follow each other; those along the others are equal."""
    (output,) = operation.outputs
    sources = [each for each in operation.args[0] if each.dim() == output.dim()]  # cat skips empty vectors
    axes: Axes = [None] * output.dim()
    dim = operation.argument("dim", 0) % output.dim()
    reason = flow.reason(operation, "joins them to entries that cannot be removed")
    for axis in range(output.dim()):
        parts = [flow.labels.of(each)[axis] for each in sources]
        if axis != dim:
            axes[axis] = parts[0]
            for part in parts[1:]:
                axes[axis] = flow.labels.unite(axes[axis], part, reason)
        elif any(part is not None for part in parts):
            axes[axis] = torch.cat([
                _frozen(flow, each.shape[axis]) if part is None else part
                for each, part in zip(sources, parts, strict=True)
            ])  # fmt: skip
    flow.labels.set(output, axes)


def _stack(flow: NeuronFlow, operation: Operation) -> None:
    """A new dimension, whose entries cannot be removed; the labels along the others are equal."""
    (output,), sources = operation.outputs, operation.args[0]
    reason = flow.reason(operation, "joins them to entries that cannot be removed")
    axes = list(flow.labels.of(sources[0]))
    for source in sources[1:]:
        axes = [flow.labels.unite(*each, reason) for each in zip(axes, flow.labels.of(source), strict=True)]
    axes.insert(operation.argument("dim", 0) % output.dim(), None)
    flow.labels.set(output, axes)


def _frozen(flow: NeuronFlow, size: int) -> Tensor:
    """Labels of entries that cannot be removed."""
    labels = flow.labels.new(size)
    flow.labels.freeze(labels, "its entries cannot be removed")
    return labels


def _padding(flow: NeuronFlow, operation: Operation) -> None:
    """Padding adds entries that cannot be removed."""
    (output,), source = operation.outputs, operation.args[0]
    axes, pad = flow.labels.of(source), operation.args[1]
    for index in range(len(pad) // 2):
        axis, (before, behind) = source.dim() - 1 - index, pad[2 * index : 2 * index + 2]
        labels = axes[axis]
        if labels is not None and (before or behind):
            if min(before, behind) < 0 or operation.name != "constant_pad_nd":
                flow.labels.freeze(labels, flow.reason(operation, "takes away or repeats some of them"))
                labels = None
            else:
                labels = torch.cat([_frozen(flow, before), labels, _frozen(flow, behind)])
        axes = [*axes[:axis], labels, *axes[axis + 1 :]]
    flow.labels.set(output, axes)


def _index(flow: NeuronFlow, operation: Operation) -> None:
    """Indexing by tensors: the other dimensions keep their labels."""
    (output,), source, indices = operation.outputs, operation.args[0], operation.args[1]
    axes = flow.labels.of(source)
    indexed = [axis for axis, index in enumerate(indices) if index is not None]
    for axis in indexed:
        flow.labels.freeze(axes[axis], flow.reason(operation, "takes some of them by their indices"))
    if indexed != list(range(indexed[0], indexed[-1] + 1)) or any(
        indices[axis].dtype in (torch.bool, torch.uint8) for axis in indexed
    ):
        flow.labels.freeze_all([source], flow.reason(operation, "mixes dimensions"))
        return
    new = output.dim() - (source.dim() - len(indexed))
    flow.labels.set(output, [*axes[: indexed[0]], *[None] * new, *axes[indexed[-1] + 1 :]])


def _index_select(flow: NeuronFlow, operation: Operation) -> None:
    axes = _without(flow, operation, [operation.args[1]], "takes some of them by their indices")
    flow.labels.set(operation.outputs[0], axes)


def _glu(flow: NeuronFlow, operation: Operation) -> None:
    (output,), source = operation.outputs, operation.args[0]
    axes, dim = list(flow.labels.of(source)), operation.argument("dim", -1) % source.dim()
    if axes[dim] is not None:
        axes[dim] = flow.labels.unite_rows(axes[dim].view(2, -1))
    flow.labels.set(output, axes)


# --- Elementwise operations, and operations that mix entries of some dimensions only


def _pointwise(flow: NeuronFlow, operation: Operation) -> None:
    """The labels of all operands are equal, dimension by dimension; operands of one entry broadcast."""
    for output in operation.outputs:
        operands = [each for each in operation.inputs if each.dim() <= output.dim()]
        axes: Axes = []
        for back in range(output.dim(), 0, -1):
            size = output.shape[-back]
            parts = [
                flow.labels.of(each)[-back] for each in operands if each.dim() >= back and each.shape[-back] == size
            ]
            if size == 1:  # a single entry is never removed, and may be a number that broadcasts
                parts = [part for part in parts if part is not None]
            label = parts[0] if parts else None
            for part in parts[1:]:
                if part is not label:
                    label = flow.labels.unite(label, part, _foreign_operand(flow, operation))
            axes.append(label)
        flow.labels.set(output, axes)
    for each in operation.inputs:  # nn.RMSNorm scales by its weight in an elementwise product
        if each.dim() == 1:
            flow.set_size(flow.stored(each), 0, "normalized_shape")
    if operation.name in ("clone", "_to_copy", "detach", "alias", "lift_fresh"):
        flow.move(operation.args[0], operation.outputs[0])


def _foreign_operand(flow: NeuronFlow, operation: Operation) -> str:
    effect = {
        "mul": "multiplies them by a tensor that cannot be narrowed",
        "add": "adds a tensor to them that cannot be narrowed",
    }.get(operation.name, "combines them with a tensor that cannot be narrowed")
    return flow.reason(operation, effect)


def _pool(flow: NeuronFlow, operation: Operation) -> None:
    """Pooling, interpolation and padding by reflection: over the last dimensions, for each channel separately."""
    source, name = operation.args[0], operation.name
    dimensions = int(re.findall(r"(\d)d", name)[0])
    axes = _without(flow, operation, range(source.dim() - dimensions, source.dim()), "pools over them")
    for output in operation.outputs:
        flow.labels.set(output, axes)


def _one_dimension(flow: NeuronFlow, operation: Operation) -> None:
    """softmax, cumsum, sort, topk and similar."""
    _mix(flow, operation, [operation.argument("dim", -1)], kept=True)


def _reduction(flow: NeuronFlow, operation: Operation) -> None:
    """mean, sum, amax, var and similar over some dimensions."""
    dims = operation.argument("dim")
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        dims = range(operation.args[0].dim())
    dims = [dims] if isinstance(dims, int) else list(dims)
    _mix(flow, operation, dims, kept=bool(operation.argument("keepdim", False)))


def _mix(flow: NeuronFlow, operation: Operation, dims: list[int], *, kept: bool) -> None:
    source = operation.args[0]
    over = {dim % source.dim() for dim in dims} if source.dim() else set()
    in_norm = "norm" in flow.kind(operation).lower()
    accepted = _divides_by_root_mean_square(flow, operation, over) or (in_norm and not flow.keep_norm_statistics)
    axes = _without(flow, operation, over, None if accepted else _MIXES if in_norm else "computes with all of them")
    for output in operation.outputs:
        same = output.dim() == source.dim() or kept
        flow.labels.set(output, axes if same else [each for axis, each in enumerate(axes) if axis not in over])


def _divides_by_root_mean_square(flow: NeuronFlow, mean: Operation, over: set[int]) -> bool:
    """Whether a mean is that of x · rsqrt(mean(x²) + ε) · weight; the norm is noted then.

    nn.RMSNorm and the norms of transformers run these operations.
    """
    square = mean.args[0]
    if mean.name != "mean" or over != {square.dim() - 1} or not mean.argument("keepdim", False):
        return False
    source = flow.makers.get(id(square))
    if source is None or source.name != "pow" or source.args[1] != 2:
        return False
    chain = [mean]
    for name in ("add", "rsqrt", "mul", "mul"):
        user = _only_user(flow, chain[-1], name)
        if user is None:
            return False
        chain.append(user)
    _, shifted, root, scaled, weighted = chain
    x = next((each for each in scaled.inputs if each is not root.outputs[0]), None)
    if x is not source.args[0] or len(shifted.inputs) != 1:
        return False
    return _note_norm(flow, shifted, weighted, mean.call.module)


def _only_user(flow: NeuronFlow, maker: Operation, name: str) -> Operation | None:
    """The operation `name` that alone reads what `maker` returned, directly or as another dtype."""
    users = flow.users.get(id(maker.outputs[0]), [])
    users = users[users.index(maker) + 1 :] if maker in users else users  # an operation in place returns its argument
    if users and users[0].target._schema.is_mutable:
        users = users[:1]
    if len(users) == 1 and users[0].name == "_to_copy":
        return _only_user(flow, users[0], name)
    return users[0] if len(users) == 1 and users[0].name == name else None


def _note_norm(flow: NeuronFlow, shifted: Operation, weighted: Operation, module: str) -> bool:
    """Note a norm that adds ε in `shifted` and multiplies by its weight in `weighted`, if it can be rescaled."""
    epsilon, held = shifted.args[1], vars(flow.model.get_submodule(module))
    resolution = torch.finfo(shifted.outputs[0].dtype).eps
    attributes = [name for name, value in held.items() if type(value) is float and same_epsilon(value, epsilon)]
    attributes += ["eps"] if "eps" in held and held["eps"] is None and epsilon == resolution else []
    for tensor in weighted.inputs:
        offset = flow.makers.get(id(tensor))
        is_offset = offset is not None and offset.name == "add" and len(offset.inputs) == 1
        weight = _stored_or_cast(flow, offset.inputs[0] if is_offset and offset is not None else tensor)
        if weight is None or weight.module != module or len(attributes) != 1:
            continue
        if weight.of(flow.model).shape != weighted.outputs[0].shape[-1:]:
            continue
        added = float(offset.args[1]) if is_offset and offset is not None else 0.0
        flow.norms[id(shifted)] = RootMeanSquareNorm(module, attributes[0], weight, added)
        return True
    return False


def same_epsilon(a: float, b: float) -> bool:
    """Whether two numbers are the same in float32; nn.RMSNorm adds its ε in the dtype of its argument."""
    return math.isclose(a, b, rel_tol=1e-6)


def _stored_or_cast(flow: NeuronFlow, tensor: Tensor) -> StoredTensor | None:
    """The stored tensor that `tensor` is, or is a copy of in another dtype; the copy may not have been followed yet."""
    maker = flow.makers.get(id(tensor))
    return flow.stored(maker.args[0] if maker is not None and maker.name == "_to_copy" else tensor)


# --- Normalisation


def _batch_norm(flow: NeuronFlow, operation: Operation) -> None:
    """One scale, one shift and two running statistics for each entry of dimension 1."""
    source, tensors = operation.args[0], [each for each in operation.args[1:5] if isinstance(each, Tensor)]
    labels = flow.labels.of(source)[1]
    for tensor in tensors:
        labels = flow.labels.unite(labels, flow.labels.of(tensor)[0], flow.reason(operation, "normalises them"))
        flow.set_size(flow.stored(tensor), 0, "num_features")
    axes = [*flow.labels.of(source)[:1], labels, *flow.labels.of(source)[2:]]
    if flow.keep_norm_statistics:
        for others in (axes[0], *axes[2:]):  # statistics of a batch are over all other dimensions
            flow.labels.freeze(others, flow.reason(operation, _MIXES))
    for output in operation.outputs:  # the others are the batch's statistics
        flow.labels.set(output, axes if output.dim() > 1 else [labels if output.numel() == source.shape[1] else None])
    weight = flow.stored(source)
    if weight is not None:  # weight standardisation (Qiao et al. 2019, arXiv:1903.10520)
        flow.origins[id(operation.outputs[0])] = weight
        flow.computed.add(id(operation.outputs[0]))


def _layer_norm(flow: NeuronFlow, operation: Operation) -> None:
    """Statistics over the last dimensions, which depend on every neuron."""
    source, shape = operation.args[0], operation.args[1]
    axes = list(flow.labels.of(source))
    for back in range(len(shape), 0, -1):
        for tensor in (each for each in operation.args[2:4] if isinstance(each, Tensor)):
            part = flow.labels.of(tensor)[-back]
            axes[-back] = flow.labels.unite(axes[-back], part, flow.reason(operation, "scales them"))
            if len(shape) == 1:
                flow.set_size(flow.stored(tensor), 0, "normalized_shape")
        if flow.keep_norm_statistics:
            flow.labels.freeze(axes[-back], flow.reason(operation, _MIXES))
    statistics = [*axes[: -len(shape)], *[None] * len(shape)]
    for index, output in enumerate(operation.outputs):
        flow.labels.set(output, statistics if index else axes)


def _group_norm(flow: NeuronFlow, operation: Operation) -> None:
    """Statistics over groups of channels; whole groups are removed."""
    source, weight, bias, groups = operation.args[0], operation.args[1], operation.args[2], operation.args[6]
    axes = list(flow.labels.of(source))
    labels = axes[1]
    for tensor in (each for each in (weight, bias) if isinstance(each, Tensor)):
        labels = flow.labels.unite(labels, flow.labels.of(tensor)[0], flow.reason(operation, "scales them"))
        flow.set_size(flow.stored(tensor), 0, "num_channels", *(["num_groups"] if groups > 1 else []))
    statistics = None
    if labels is not None and groups > 1:
        statistics = flow.labels.unite_rows(labels.view(groups, -1).T)
    elif flow.keep_norm_statistics:
        flow.labels.freeze(labels, flow.reason(operation, _MIXES))
    axes[1] = labels
    for index, output in enumerate(operation.outputs):
        flow.labels.set(output, [None, statistics] if index else axes)


_MIXES = "computes each neuron from all of them, so removing one would change the others (streams='all' accepts that)"


# --- Layers


def _product(flow: NeuronFlow, operation: Operation) -> None:
    """mm, bmm, addmm and baddbmm; and linear, whose weight is transposed."""
    if operation.name == "linear":
        a, b, *bias = (each for each in operation.args if each is not None)
        sums, writes = 1, 0  # the dimensions of the weight
    else:
        *bias, a, b = operation.args[: 3 if operation.name in ("addmm", "baddbmm") else 2]
        sums, writes = b.dim() - 2, b.dim() - 1
    axes = [*flow.labels.of(a)[:-1], flow.labels.of(b)[writes]]
    if b.dim() == 3:
        axes[0] = flow.labels.unite(axes[0], flow.labels.of(b)[0], _foreign_operand(flow, operation))
    _contract(flow, operation, a, a.dim() - 1, b, sums)
    for each in bias:
        _add_bias(flow, operation, axes, each)
    flow.labels.set(operation.outputs[0], axes)
    stored, labels = flow.stored(b), flow.labels.of(b)[writes]
    if stored is not None:
        flow.applied[stored] += math.prod(operation.outputs[0].shape[:-1])
        axis = _stored_axis(flow, stored, labels)
        if labels is not None and axis is not None:
            flow.write(operation, stored, labels)
            flow.set_size(stored, axis, "out_features", "nf")


def _add_bias(flow: NeuronFlow, operation: Operation, axes: Axes, bias: Tensor) -> None:
    for back in range(1, bias.dim() + 1):
        if bias.shape[-back] > 1:
            axes[-back] = flow.labels.unite(axes[-back], flow.labels.of(bias)[-back], _foreign_operand(flow, operation))


def _contract(flow: NeuronFlow, operation: Operation, a: Tensor, a_axis: int, b: Tensor, b_axis: int) -> None:
    """A sum over one dimension of two tensors, one of which is a stored weight where neurons are read."""
    mine, other = flow.labels.of(a)[a_axis], flow.labels.of(b)[b_axis]
    stored_a, stored_b = flow.stored(a), flow.stored(b)
    if (stored_a is None) == (stored_b is None):
        effect = "multiplies activations and sums over the neurons, or its weight is computed in the forward pass"
        for labels in (mine, other):
            flow.labels.freeze(labels, flow.reason(operation, effect))
        return
    flow.labels.unite(mine, other, flow.reason(operation, "reads them together with entries that cannot be removed"))
    value, value_axis, weight, tensor, axis = (
        (a, a_axis, stored_b, b, b_axis) if stored_b else (b, b_axis, stored_a, a, a_axis)
    )
    labels = flow.labels.of(tensor)[axis]
    if mine is not None and labels is not None and weight is not None:
        weight_axis = _stored_axis(flow, weight, labels)
        own = None if weight_axis is None else flow.stored_axes[weight][weight_axis]
        if weight_axis is None or own is None or not torch.equal(labels, own):
            flow.labels.freeze(mine, flow.reason(operation, f"reads them through a rearranged {weight.name}"))
            return
        computed = id(tensor) in flow.computed
        flow.reads.append(Read(operation, value, value_axis, weight, weight_axis, computed=computed))
        flow.set_size(weight, weight_axis, "in_features", "nx")  # nx is that of transformers' Conv1D


def _stored_axis(flow: NeuronFlow, stored: StoredTensor, labels: Tensor | None) -> int | None:
    """The dimension of a stored tensor that all these labels come from."""
    for axis, own in enumerate(flow.stored_axes[stored]):
        if own is not None and labels is not None and bool(((labels >= own[0]) & (labels <= own[-1])).all()):
            return axis
    return None


def _convolution(flow: NeuronFlow, operation: Operation) -> None:
    """Convolutions of any dimension: transposed, depthwise and with groups."""
    value, weight, bias = operation.args[:3]
    transposed, groups = operation.args[6], operation.args[8]
    for axis in range(2, weight.dim()):
        flow.labels.freeze(flow.labels.of(weight)[axis], "a filter's positions cannot be removed")
    stored, (output,) = flow.stored(weight), operation.outputs
    x, reads, writes = flow.labels.of(value)[1], int(not transposed), int(transposed)
    w_in, w_out = flow.labels.of(weight)[reads], flow.labels.of(weight)[writes]
    if stored is None:
        flow.labels.freeze_all(
            [value, weight], flow.reason(operation, "has a weight that is computed in the forward pass")
        )
        return
    out = w_out
    if groups == 1:
        reason = flow.reason(operation, "reads them together with entries that cannot be removed")
        flow.labels.unite(x, w_in, reason)
    else:
        w_in, out = _grouped(flow, operation, stored, x, w_in, w_out, groups, transposed=transposed)
    if bias is not None:
        out = flow.labels.unite(out, flow.labels.of(bias)[0], _foreign_operand(flow, operation))
    flow.labels.set(output, [flow.labels.of(value)[0], out, *[None] * (output.dim() - 2)])
    if x is not None and w_in is not None:
        padded = not transposed and any(operation.args[4])
        flow.reads.append(Read(operation, value, 1, stored, reads, groups, padded, id(weight) in flow.computed))
        flow.set_size(stored, reads, "in_channels")
    shape = value.shape if transposed else output.shape
    flow.applied[stored] += shape[0] * math.prod(shape[2:])
    if out is not None and not (groups > 1 and value.shape[1] == groups):  # a depthwise convolution computes none
        flow.write(operation, stored, out)
        flow.set_size(stored, writes, "out_channels")


def _grouped(
    flow: NeuronFlow, operation: Operation, stored: StoredTensor, x: Tensor | None, w_in: Tensor | None,
    w_out: Tensor | None, groups: int, *, transposed: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Labels of the inputs and outputs of a convolution with groups.

    Each group has the same number of inputs and of outputs. So either equally many channels of each group are removed,
    and the inputs are independent of the outputs; or whole groups, with their inputs and outputs. The second is the
    only way for a depthwise convolution.
    """
    reason = flow.reason(operation, f"has {groups} groups of channels, which must keep equal sizes")
    value, (output,) = operation.args[0], operation.outputs
    inputs, outputs = value.shape[1] // groups, output.shape[1] // groups
    if transposed:  # its weight is (inputs, outputs of a group)
        for labels in (x, w_in, w_out):
            flow.labels.freeze(labels, reason)
        return None, None
    whole = inputs == 1 or (outputs > 1 and flow.choose(operation, w_out, "groups", 2) == 1)
    if not whole and w_out is not None:
        if x is not None and w_in is not None:
            flow.labels.unite(flow.labels.unite_rows(x.view(groups, -1)), w_in, reason)
        flow.labels.unite_rows(w_out.view(groups, -1)) if outputs > 1 else flow.labels.freeze(w_out, reason)
        return w_in, w_out
    flow.labels.freeze(w_in, reason)
    if x is None or w_out is None:
        flow.labels.freeze(x, reason)
        flow.labels.freeze(w_out, _fixed_channels(flow, operation))
        return None, w_out
    flow.labels.unite(
        flow.labels.unite_rows(x.view(groups, -1).T), flow.labels.unite_rows(w_out.view(groups, -1).T), reason
    )
    flow.set_size(stored, 0, "in_channels", "groups", "out_channels")
    return None, w_out


def _fixed_channels(flow: NeuronFlow, operation: Operation) -> str:
    """The reason why a convolution of whole groups keeps its outputs where its inputs cannot be removed."""
    value = operation.args[0]
    while id(value) in flow.moved:
        value = flow.moved[id(value)]
    if any(value is output for each in flow.recording.operations for output in each.outputs):
        return flow.reason(operation, "filters channels that cannot be removed")
    return "its channels are those of the model's inputs"


def _embedding(flow: NeuronFlow, operation: Operation) -> None:
    """Rows are chosen by tokens; the entries of a row are neurons."""
    (output,), weight = operation.outputs, operation.args[0]
    rows, columns = flow.labels.of(weight)
    flow.labels.freeze(rows, flow.reason(operation, "chooses one of them for each token"))
    flow.labels.set(output, [None] * (output.dim() - 1) + [columns])
    stored = flow.stored(weight)
    if stored is not None and columns is not None:
        flow.write(operation, stored, columns)
        flow.set_size(stored, 1, "embedding_dim")


def _attention(flow: NeuronFlow, operation: Operation) -> None:
    """scaled_dot_product_attention keeps batches and heads, and sums over positions and the entries of q and k."""
    query, key, value = operation.args[:3]
    axes: Axes = [None] * query.dim()
    reason = flow.reason(operation, "computes with all of them")
    for axis in range(query.dim() - 2):
        axes[axis], *parts = [flow.labels.of(each)[axis] for each in (query, key, value)]
        heads = axes[axis]
        if heads is not None and heads.numel() != key.shape[axis]:  # each head of k and v has several of q
            heads = flow.labels.unite_rows(heads.view(key.shape[axis], -1).T)
        for part in parts:
            flow.labels.unite(heads, part, reason)
    for tensor, axis in ((query, -2), (query, -1), (key, -2), (key, -1), (value, -2)):
        flow.labels.freeze(flow.labels.of(tensor)[axis], reason)
    axes[-1] = flow.labels.of(value)[-1]
    for mask in operation.inputs[3:]:  # it broadcasts over batches and heads
        for back in range(1, mask.dim() + 1):
            if back > 2 and mask.shape[-back] > 1:
                flow.labels.unite(axes[-back], flow.labels.of(mask)[-back], reason)
            else:
                flow.labels.freeze(flow.labels.of(mask)[-back], reason)
    for output in operation.outputs:  # the second is the logarithm of the sums of exponentials
        flow.labels.set(
            output, axes if output.dim() == 4 else [*axes[:2], None] if output.dim() == 3 else [None] * output.dim()
        )


# --- Tensors made in the forward pass


def _factory(flow: NeuronFlow, operation: Operation) -> None:
    """zeros, empty, rand and similar: all entries are alike, and sizes may follow from other tensors."""
    for output in operation.outputs:
        flow.labels.set(output, [flow.labels.new(size) for size in output.shape])


Handler = Callable[[NeuronFlow, Operation], None]

FACTORIES = """
    zeros ones full empty empty_strided empty_permuted new_zeros new_ones new_empty new_full new_empty_strided
    rand randn scalar_tensor
""".split()  # noqa: SIM905 - a list would be a page long
_PARTS = ("slice", "select", "split", "split_with_sizes", "unbind", "chunk")
SIZED = ("view", "_unsafe_view", "reshape", "expand", "slice", "split", "split_with_sizes")
_POINTWISE = """
    _to_copy detach alias lift_fresh copy fill zero hardswish _prelu_kernel log_sigmoid_forward
    native_dropout dropout bernoulli uniform normal exponential
    zeros_like ones_like empty_like full_like rand_like randn_like
""".split()  # noqa: SIM905
_MOVEMENTS = """
    view _unsafe_view reshape permute transpose t squeeze unsqueeze flip repeat pixel_shuffle pixel_unshuffle unfold
""".split()  # noqa: SIM905
_POOLS = [
    *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "reflection_pad",
      "_adaptive_avg_pool", "adaptive_avg_pool", "replication_pad", "upsample_nearest", "_upsample_nearest_exact")),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "upsample_linear1d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
]  # fmt: skip
_BATCH_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    miopen_batch_norm batch_norm _batch_norm_with_update _batch_norm_no_update
""".split()  # noqa: SIM905
_ATTENTIONS = """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable
""".split()  # noqa: SIM905
LAYERS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "embedding")

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys([*_MOVEMENTS, *_PARTS], _movement),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    **dict.fromkeys(_ATTENTIONS, _attention),
    **dict.fromkeys(FACTORIES, _factory),
    **dict.fromkeys(["_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk"], _one_dimension),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "var", "var_mean", "std", "std_mean", "logsumexp", "prod", "all",
                     "any", "max", "min", "linalg_vector_norm", "argmax", "argmin"], _reduction),
    **dict.fromkeys(["mm", "addmm", "bmm", "baddbmm", "linear"], _product),
    "as_strided": _strided,
    "channel_shuffle": _channel_shuffle,
    "native_channel_shuffle": _channel_shuffle,
    "roll": _roll,
    "stack": _stack,
    "cat": _concatenation,
    "constant_pad_nd": _padding,
    "convolution": _convolution,
    "embedding": _embedding,
    "expand": _expand,
    "glu": _glu,
    "index": _index,
    "index_select": _index_select,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
}  # fmt: skip
