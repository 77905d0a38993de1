"""Removing neurons from a model and its optimizer: planned and checked whole, then applied or not at all.

The plan allocates every new tensor before anything changes. Applying it only swaps tensors and integers, and
keeps an undo log: an error on the way puts back what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kddp_ext import ops
from kddp_ext.pruning.graph import StoredTensor
from kddp_ext.pruning.neurons import NeuronGroup


@dataclass(frozen=True)
class Removal:
    """Neurons of one group that go.

    Attributes:
        group: the group.
        keep: ascending int64 indices of the neurons that stay, at least one.
        means: (width,) float64, the average activation of each neuron, where what the pruned ones contributed
            on average is to be added to the next layer; None for no compensation.
    """

    group: NeuronGroup
    keep: Tensor
    means: Tensor | None = None

    @property
    def pruned(self) -> Tensor:
        """Ascending int64 indices of the neurons that go."""
        gone = torch.ones(self.group.width, dtype=torch.bool)
        gone[self.keep] = False
        return gone.nonzero().flatten()


@dataclass
class _TensorPlan:
    """What one parameter or buffer becomes, with its gradient and what the optimizer keeps of it."""

    tensor: Tensor
    new: Tensor
    new_grad: Tensor | None
    new_state: dict[Any, Tensor]


class CompactionPlan:
    """Everything that a compaction changes, ready to be applied. Made by `plan_compaction`."""

    def __init__(
        self,
        tensors: list[_TensorPlan],
        attributes: list[tuple[object, str, Any]],
        optimizer: Optimizer | None,
    ) -> None:
        self._tensors = tensors
        self._attributes = attributes
        self._optimizer = optimizer

    def apply(self, also: Sequence[tuple[object, str, Any]] = ()) -> None:
        """Carry the plan out. On any error, an interrupt included, everything is put back.

        Args:
            also: further attributes, (object, name, value), to be set last: they change with the model or not
                at all.
        """
        undo: list[Callable[[], None]] = []
        try:
            for plan in self._tensors:
                self._apply_tensor(plan, undo)
            for holder, attribute, value in [*self._attributes, *also]:
                undo.append(partial(setattr, holder, attribute, getattr(holder, attribute)))
                setattr(holder, attribute, value)
        except BaseException:
            for step in reversed(undo):
                step()
            raise

    def _apply_tensor(self, plan: _TensorPlan, undo: list[Callable[[], None]]) -> None:
        undo.append(partial(set_data, plan.tensor, plan.tensor.data, plan.tensor.grad))
        set_data(plan.tensor, plan.new, plan.new_grad)
        if self._optimizer is not None and plan.new_state:
            state = self._optimizer.state[plan.tensor]
            undo.append(partial(state.update, dict(state)))
            state.update(plan.new_state)


def set_data(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give a parameter or buffer data of another shape; its identity and its hooks stay.

    A live graph holds the node that accumulates the parameter's gradient, and that node remembers the shape:
    the next backward would fail. Data of another dtype makes torch drop the node (`VariableHooks::set_data`
    in torch/csrc/autograd/variable.cpp), and it makes a new one when it next needs one.
    """
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    tensor.grad = None
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = grad


def require_sliceable_optimizer(optimizer: Optimizer) -> None:
    """Raise a ValueError for an optimizer whose state is not kept parameter by parameter."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS keeps one flat history of all parameters, which cannot be sliced")


def plan_compaction(
    model: nn.Module, removals: Sequence[Removal], optimizer: Optimizer | None = None
) -> CompactionPlan:
    """Plan the removal of neurons, changing nothing.

    Args:
        model: the model that the removals' groups were traced from.
        removals: at most one for each group.
        optimizer: its state of the changed parameters is sliced alike; parameters that it does not hold are
            fine.

    Raises:
        ValueError: a tensor of the model or of the optimizer's state is not of the shape that the groups say.
    """
    removal_of: dict[StoredTensor, dict[int, Removal]] = {}
    attributes: list[tuple[object, str, Any]] = []
    for removal in removals:
        for stored, axis in removal.group.slices:
            removal_of.setdefault(stored, {})[axis] = removal
        for name, attribute in removal.group.sizes:
            attributes.append((model.get_submodule(name), attribute, int(removal.keep.numel())))

    plans: dict[StoredTensor, _TensorPlan] = {}
    shifts: list[tuple[StoredTensor, Tensor]] = []
    for stored, by_axis in removal_of.items():
        tensor = _tensor(model, stored, by_axis)
        plans[stored], shift = _plan_tensor(stored, tensor, by_axis, optimizer)
        reader = by_axis[1].group.reader(stored) if 1 in by_axis and by_axis[1].means is not None else None
        if reader is not None and reader.shift is not None:
            shifts.append((reader.shift, shift))
    for target, shift in shifts:
        if target not in plans:
            tensor = _tensor(model, target, {})
            plans[target] = _TensorPlan(tensor, tensor.data, tensor.grad, {})
        plans[target].new = _shifted(target, plans[target].new, shift)
    return CompactionPlan(list(plans.values()), attributes, optimizer)


def _tensor(model: nn.Module, stored: StoredTensor, by_axis: Mapping[int, Removal]) -> Tensor:
    tensor = getattr(model.get_submodule(stored.module), stored.attribute)
    for axis, removal in by_axis.items():
        if not isinstance(tensor, Tensor) or tensor.dim() <= axis or tensor.shape[axis] != removal.group.width:
            raise ValueError(
                f"model: {stored.name} was traced with {removal.group.width} neurons of {removal.group.name} "
                f"along dimension {axis}, and is now {getattr(tensor, 'shape', tensor)}; make a new pruner "
                "after changing the model"
            )
    assert isinstance(tensor, Tensor)
    return tensor


def _plan_tensor(
    stored: StoredTensor, tensor: Tensor, by_axis: Mapping[int, Removal], optimizer: Optimizer | None
) -> tuple[_TensorPlan, Tensor]:
    """The sliced tensor, gradient and optimizer state; and W2[:, p] · E[h_p], (kept rows,) float64."""
    state = _sliceable_state(stored, tensor, optimizer)
    same_shape = {key: value for key, value in state.items() if value.shape == tensor.shape}
    tensors = [tensor.data, *([] if tensor.grad is None else [tensor.grad]), *same_shape.values()]
    gathered, shift = _gather(tensors, by_axis)
    new, *rest = gathered
    new_grad = rest.pop(0) if tensor.grad is not None else None
    new_state = dict(zip(same_shape, rest, strict=True))
    for key, value in state.items():  # factored moments have length 1 along some dimensions: those stay
        if key not in same_shape:
            kept_axes = {axis: removal for axis, removal in by_axis.items() if value.shape[axis] != 1}
            without_means = {axis: replace(removal, means=None) for axis, removal in kept_axes.items()}
            new_state[key] = _gather([value], without_means)[0][0]
    return _TensorPlan(tensor, new, new_grad, new_state), shift


def _gather(tensors: list[Tensor], by_axis: Mapping[int, Removal]) -> tuple[list[Tensor], Tensor]:
    first, device = tensors[0], tensors[0].device
    keep = {axis: removal.keep.to(device) for axis, removal in by_axis.items()}
    pruned, means = None, None
    if 1 in by_axis and by_axis[1].means is not None:
        pruned = by_axis[1].pruned.to(device)
        means = by_axis[1].means.to(device)[pruned]
    return ops.gather_slices(
        tensors,
        keep.get(0),
        keep.get(1),
        rows=first.shape[0],
        columns=first.shape[1] if first.dim() > 1 else 1,
        pruned_columns=pruned,
        pruned_means=means,
    )


def _sliceable_state(stored: StoredTensor, tensor: Tensor, optimizer: Optimizer | None) -> dict[Any, Tensor]:
    """The tensors in the optimizer's state of `tensor` that have its dimensions; scalars stay as they are."""
    sliceable = {}
    state = optimizer.state[tensor] if optimizer is not None and tensor in optimizer.state else {}
    for key, value in state.items():
        if value is None or isinstance(value, bool | int | float | str):
            continue
        if isinstance(value, Tensor) and value.dim() == 0:
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or not _fits(value.shape, tensor.shape):
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps {key!r} of {stored.name}, {kind}, and it is "
                f"not known how that follows the parameter's shape {tuple(tensor.shape)}; nothing was pruned"
            )
        sliceable[key] = value
    return sliceable


def _fits(shape: torch.Size, parameter: torch.Size) -> bool:
    return len(shape) == len(parameter) and all(a in (1, b) for a, b in zip(shape, parameter, strict=True))


def _shifted(target: StoredTensor, values: Tensor, shift: Tensor) -> Tensor:
    """A bias takes the shift up; a running mean, which is subtracted, takes up its opposite."""
    shift = shift.to(values.device)
    shifted = (values.double() - shift if target.attribute == "running_mean" else values.double() + shift).to(
        values.dtype
    )
    if not bool(shifted.isfinite().all()):
        raise ValueError(f"model: compensating for pruned neurons makes {target.name} infinite or NaN")
    return shifted
