"""Normalisation: one operation, or the operations of which nn.RMSNorm and the norms of transformers consist."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kddp_ext.pruning.tracing.flow import NeuronFlow
from kddp_ext.pruning.tracing.recording import Operation
from kddp_ext.pruning.tracing.structure import RootMeanSquareNorm, StoredTensor

MIXES = "computes each neuron from all of them, so removing one would change the others (streams='all' accepts that)"


def batch_norm(flow: NeuronFlow, operation: Operation) -> None:
    """One scale, one shift and two running statistics for each entry of dimension 1."""
    source, tensors = operation.args[0], [each for each in operation.args[1:5] if isinstance(each, Tensor)]
    labels = flow.labels.of(source)[1]
    for tensor in tensors:
        labels = flow.labels.unite(labels, flow.labels.of(tensor)[0], flow.reason(operation, "normalises them"))
        flow.set_size(flow.stored(tensor), 0, "num_features")
    axes = [*flow.labels.of(source)[:1], labels, *flow.labels.of(source)[2:]]
    if flow.keep_norm_statistics:
        for others in (axes[0], *axes[2:]):  # statistics of a batch are over all other dimensions
            flow.labels.freeze(others, flow.reason(operation, MIXES))
    for output in operation.outputs:  # the others are the batch's statistics
        flow.labels.set(output, axes if output.dim() > 1 else [labels if output.numel() == source.shape[1] else None])
    weight = flow.stored(source)
    if weight is not None:  # weight standardisation (Qiao et al. 2019, arXiv:1903.10520)
        flow.origins[id(operation.outputs[0])] = weight
        flow.computed.add(id(operation.outputs[0]))


def layer_norm(flow: NeuronFlow, operation: Operation) -> None:
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
            flow.labels.freeze(axes[-back], flow.reason(operation, MIXES))
    statistics = [*axes[: -len(shape)], *[None] * len(shape)]
    for index, output in enumerate(operation.outputs):
        flow.labels.set(output, statistics if index else axes)


def group_norm(flow: NeuronFlow, operation: Operation) -> None:
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
        flow.labels.freeze(labels, flow.reason(operation, MIXES))
    axes[1] = labels
    for index, output in enumerate(operation.outputs):
        flow.labels.set(output, [None, statistics] if index else axes)


def divides_by_root_mean_square(flow: NeuronFlow, mean: Operation, over: set[int]) -> bool:
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
