"""The size of a model at widths that it does not have yet, and how much must go for it to be small enough."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from math import prod

from torch import Tensor, nn

from kddp_ext.pruning.guards import removal_steps
from kddp_ext.pruning.tracing.groups import NeuronGroup


class ModelSize:
    """Parameters and multiply-accumulates of a model, at the groups' present widths or at any others.

    Nothing is built: along each dimension that belongs to a group's neurons, a tensor shrinks by the group's
    share that is left. A weight between two groups shrinks by both.

    Args:
        model: the model, at the groups' widths.
        groups: its neurons.
        positions: at how many positions of a sample each weight (by its name in the state_dict) is applied;
            weights that are not in it count as parameters only.

    Raises:
        ValueError: a tensor is gone, or has another shape than the groups say.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup], positions: Mapping[str, float]) -> None:
        self._widths = [group.width for group in groups]
        slicing: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            for slices in group.slices:
                tensor, axis = _tensor(model, slices.stored.name), slices.layout.axis
                if tensor.dim() <= axis or tensor.shape[axis] != group.width * slices.layout.entries:
                    raise ValueError(
                        f"model: {slices.stored.name} was traced with {group.width} neurons of {group.name} along "
                        f"dimension {axis}, and is now {tensor.shape}; make a new pruner after changing the model"
                    )
                slicing.setdefault(id(tensor), []).append(index)
        # (elements, positions, groups) of each tensor
        self._parameters = [(each.numel(), 1, slicing.get(id(each), [])) for each in model.parameters()]
        weights = [(_tensor(model, name), count) for name, count in positions.items()]
        self._weights = [(each.numel(), count, slicing.get(id(each), [])) for each, count in weights]

    def parameters(self, widths: Sequence[int] | None = None) -> int:
        """Number of parameters of the whole model, where the groups have `widths`; by default their own."""
        return self._total(self._parameters, widths)

    def macs(self, widths: Sequence[int] | None = None) -> int:
        """Multiply-accumulates of the whole model for one sample, where the groups have `widths`."""
        return self._total(self._weights, widths)

    def _total(self, tensors: Sequence[tuple[int, float, list[int]]], widths: Sequence[int] | None) -> int:
        left = self._widths if widths is None else widths
        total = 0.0
        for elements, count, groups in tensors:
            whole = prod(self._widths[group] for group in groups)
            total += elements * prod(left[group] for group in groups) // whole * count
        return round(total)


def affordable(
    activities: Sequence[Tensor], widths: Sequence[int], round_to: int, fits: Callable[[list[int]], bool]
) -> list[int]:
    """How many of each layer's removable neurons go, until the model fits: as few as possible, weakest first.

    Neurons of all layers are ranked by activity; among equals those of the first layer stay, of a layer those
    with the lowest index. Where `round_to` is above 1, as many go at once as it takes to the next multiple, and
    their rank is that of the strongest.

    Args:
        activities: of the removable neurons of each layer, ascending.
        widths: each layer's present number of neurons.
        round_to: what widths are to be a multiple of.
        fits: whether the model is small enough at given widths; True stays True where more goes.

    Returns:
        One number a layer; all of them where the model does not fit even then.
    """
    steps = []
    for layer, (activity, width) in enumerate(zip(activities, widths, strict=True)):
        gone = 0
        for count in removal_steps(width, len(activity), round_to):
            steps.append((float(activity[count - 1]), -layer, count, count - gone))
            gone = count
    steps.sort()

    def counts(number: int) -> list[int]:
        gone = [0] * len(widths)
        for _, layer, _, size in steps[:number]:
            gone[-layer] += size
        return gone

    def enough(number: int) -> bool:
        return fits([width - gone for width, gone in zip(widths, counts(number), strict=True)])

    return counts(bisect_left(range(len(steps)), True, key=enough))


def _tensor(model: nn.Module, name: str) -> Tensor:
    holder, _, attribute = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(holder), attribute)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise ValueError(f"model: it has no {name} any more; make a new pruner after changing the model")
    return tensor
