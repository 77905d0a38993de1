"""Removing neurons from a model, its copies and its optimizers: planned and checked whole, then applied or not at all.

The plan allocates every new tensor before anything changes. Applying it only swaps tensors and integers, and
keeps an undo log: an error on the way puts back what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kddp_ext import ops
from kddp_ext.pruning.optimizer_state import sliceable_state
from kddp_ext.pruning.reconstruction import Reconstruction
from kddp_ext.pruning.tracing.graph import StoredTensor
from kddp_ext.pruning.tracing.groups import Layout, NeuronGroup, all_but


@dataclass(frozen=True)
class Removal:
    """Neurons of one group that go.

    Attributes:
        group: the group.
        keep: ascending int64 indices of the neurons that stay, at least one.
        means: float64, the average activation of each neuron, (width,), or of each of its entries in what the next
            layer reads, (width, entries), where what the pruned ones contributed on average is to be added to that
            layer; None for no compensation.
        reconstruction: how the pruned neurons follow from those that stay, whose weights in the next layer then take
            over what varied; None where the means are all. Only together with means.
    """

    group: NeuronGroup
    keep: Tensor
    means: Tensor | None = None
    reconstruction: Reconstruction | None = None

    @property
    def pruned(self) -> Tensor:
        """Ascending int64 indices of the neurons that go."""
        return all_but(self.keep, self.group.width)


@dataclass(frozen=True)
class _Cut:
    """A removal along one dimension of a tensor."""

    removal: Removal
    layout: Layout

    @property
    def size(self) -> int:
        """Entries that the dimension has before."""
        return self.removal.group.width * self.layout.entries

    @property
    def keep(self) -> Tensor:
        """Ascending int64 indices of the entries that stay."""
        return self.layout.indices(self.removal.keep, self.removal.group.width)

    @property
    def pruned(self) -> Tensor:
        """Ascending int64 indices of the entries that go."""
        return self.layout.indices(self.removal.pruned, self.removal.group.width)

    def means(self, neurons: Tensor) -> Tensor | None:
        """The average values of the entries of `neurons`, float64; None for no compensation."""
        if self.removal.means is None:
            return None
        means = self.removal.means[neurons]
        outer, inner = self.layout.outer, self.layout.inner
        entries = means.view(len(means), -1).expand(-1, outer * inner)
        return entries.reshape(len(means), outer, inner).transpose(0, 1).flatten()


@dataclass
class _TensorPlan:
    """What one parameter or buffer becomes, with its gradient and what the optimizer keeps of it."""

    tensor: Tensor
    new: Tensor
    new_grad: Tensor | None
    new_state: list[tuple[dict[Any, Any], Any, Tensor]]  # an optimizer's state of the tensor, its key, the value


class CompactionPlan:
    """Everything that a compaction changes, ready to be applied. Made by `plan_compaction`."""

    def __init__(
        self,
        tensors: list[_TensorPlan],
        attributes: list[tuple[object, str, Any]],
    ) -> None:
        self._tensors = tensors
        self._attributes = attributes

    @torch.inference_mode(False)  # what is made in that mode no later step could be trained with
    def apply(
        self,
        also: Sequence[tuple[object, str, Any]] = (),
        *,
        refresh: Sequence[Callable[[], object]] = (),
        confirm: Callable[[], object] | None = None,
    ) -> None:
        """Carry the plan out. On any error, an interrupt included, everything is put back.

        Args:
            also: further attributes, (object, name, value), to be set last: they change with the model or not
                at all.
            refresh: functions that bring what else depends on the tensors in line with them, called after the
                change, and again where it was put back.
            confirm: called at the very end; an error of it puts everything back as well.
        """
        undo: list[Callable[[], object]] = [*refresh]
        try:
            for plan in self._tensors:
                self._apply_tensor(plan, undo)
            for holder, attribute, value in [*self._attributes, *also]:
                undo.append(partial(setattr, holder, attribute, getattr(holder, attribute)))
                setattr(holder, attribute, value)
            for function in refresh:
                function()
            if confirm is not None:
                confirm()
        except BaseException:
            for step in reversed(undo):
                step()
            raise

    def _apply_tensor(self, plan: _TensorPlan, undo: list[Callable[[], object]]) -> None:
        undo.append(partial(set_data, plan.tensor, plan.tensor.data, plan.tensor.grad))
        set_data(plan.tensor, plan.new, plan.new_grad)
        for state, key, value in plan.new_state:
            undo.append(partial(state.__setitem__, key, state[key]))
            state[key] = value


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


@torch.inference_mode(False)
def plan_compaction(
    model: nn.Module,
    removals: Sequence[Removal],
    optimizers: Sequence[Optimizer] = (),
    copies: Sequence[nn.Module] = (),
) -> CompactionPlan:
    """Plan the removal of neurons, changing nothing.

    Args:
        model: the model that the removals' groups were traced from.
        removals: at most one for each group.
        optimizers: their state of the changed parameters is sliced alike; parameters that none of them holds are
            fine.
        copies: modules of the model's structure with tensors of their own, to be sliced alike. What their own
            weights make of the pruned neurons' averages is added to their own biases.

    Raises:
        ValueError: a tensor of the model, of a copy or of an optimizer's state is not of the shape that the
            groups say; the message names it.
    """
    tensors, attributes = _plan_module(model, removals, optimizers, role="model")
    for index, each in enumerate(copies):
        its_tensors, its_attributes = _plan_module(each, removals, (), role=f"copies[{index}]")
        tensors += its_tensors
        attributes += its_attributes
    return CompactionPlan(tensors, attributes)


def _plan_module(
    model: nn.Module, removals: Sequence[Removal], optimizers: Sequence[Optimizer], *, role: str
) -> tuple[list[_TensorPlan], list[tuple[object, str, Any]]]:
    """The tensors and the attributes of one module; `role` is what it is called in messages."""
    cuts: dict[StoredTensor, dict[int, _Cut]] = {}
    attributes: list[tuple[object, str, Any]] = []
    for removal in removals:
        for slices in removal.group.slices:
            cuts.setdefault(slices.stored, {})[slices.layout.axis] = _Cut(removal, slices.layout)
        for count in removal.group.counts:
            size = int(removal.keep.numel()) * count.entries
            attributes.append((model.get_submodule(count.module), count.attribute, size))

    plans: dict[StoredTensor, _TensorPlan] = {}
    shifts: list[tuple[StoredTensor, Tensor]] = []
    for stored, by_axis in cuts.items():
        tensor = _tensor(model, stored, by_axis, role=role)
        plans[stored], shift = _plan_tensor(stored, tensor, by_axis, optimizers)
        columns = by_axis[1].removal if 1 in by_axis else None
        reader = columns.group.reader(stored) if columns is not None and columns.means is not None else None
        if reader is not None and columns is not None and columns.reconstruction is not None:
            shift = shift - _take_over(plans[stored].new, tensor, by_axis)
        if reader is not None and reader.shift is not None:
            shifts.append((reader.shift, shift))
    for target, shift in shifts:
        if target not in plans:
            tensor = _tensor(model, target, {}, role=role)
            plans[target] = _TensorPlan(tensor, tensor.data, tensor.grad, [])
        plans[target].new = _shifted(target, plans[target].new, shift, role=role)
    return list(plans.values()), attributes


def _tensor(model: nn.Module, stored: StoredTensor, by_axis: Mapping[int, _Cut], *, role: str) -> Tensor:
    tensor = getattr(model.get_submodule(stored.module), stored.attribute)
    for axis, cut in by_axis.items():
        if not isinstance(tensor, Tensor) or tensor.dim() <= axis or tensor.shape[axis] != cut.size:
            group = cut.removal.group
            raise ValueError(
                f"{role}: {stored.name} was traced with {group.width} neurons of {group.name} "
                f"along dimension {axis}, and is now {getattr(tensor, 'shape', tensor)}; make a new pruner "
                "after changing the model"
            )
    assert isinstance(tensor, Tensor)
    return tensor


def _plan_tensor(
    stored: StoredTensor, tensor: Tensor, by_axis: Mapping[int, _Cut], optimizers: Sequence[Optimizer]
) -> tuple[_TensorPlan, Tensor]:
    """The sliced tensor, gradient and optimizer state; and W2[:, p] · E[h_p], (kept rows,) float64."""
    states = [
        (optimizer.state[tensor], key, value)
        for optimizer in optimizers
        for key, value in sliceable_state(stored, tensor, optimizer).items()
    ]
    together = [value for _, _, value in states if _lies_beside(value, tensor)]
    tensors = [tensor.data, *([] if tensor.grad is None else [tensor.grad]), *together]
    gathered, shift = _gather(tensors, by_axis)
    new, *rest = gathered
    new_grad = rest.pop(0) if tensor.grad is not None else None
    new_state = []
    for state, key, value in states:
        if _lies_beside(value, tensor):
            sliced = rest.pop(0)
        else:  # factored moments have length 1 along some dimensions: those stay; others were moved to another device
            sliced_axes = {axis: cut for axis, cut in by_axis.items() if value.shape[axis] != 1}
            sliced = _gather([value], sliced_axes, compensate=False)[0][0]
        new_state.append((state, key, sliced))
    return _TensorPlan(tensor, new, new_grad, new_state), shift


def _lies_beside(value: Tensor, tensor: Tensor) -> bool:
    return value.shape == tensor.shape and value.device == tensor.device


def _gather(
    tensors: list[Tensor], by_axis: Mapping[int, _Cut], *, compensate: bool = True
) -> tuple[list[Tensor], Tensor]:
    first, device = tensors[0], tensors[0].device
    keep = {axis: cut.keep.to(device) for axis, cut in by_axis.items()}
    means = by_axis[1].means(by_axis[1].removal.pruned) if compensate and 1 in by_axis else None
    gathered, shift = ops.gather_slices(
        tensors,
        keep.get(0),
        keep.get(1),
        rows=first.shape[0],
        columns=first.shape[1] if first.dim() > 1 else 1,
        pruned_columns=None if means is None else by_axis[1].pruned.to(device),
        pruned_means=None if means is None else means.to(device),
    )
    return [
        new.contiguous(memory_format=_memory_format(old)) for old, new in zip(tensors, gathered, strict=True)
    ], shift


def _take_over(new: Tensor, weight: Tensor, by_axis: Mapping[int, _Cut]) -> Tensor:
    """Add to `new`, the sliced `weight`, what makes the neurons that stay do the work of the pruned.

    Returns:
        (kept rows,) float64, what is thereby added on average to what the layer computes.
    """
    cut, device = by_axis[1], weight.device
    reconstruction, means = cut.removal.reconstruction, cut.means(cut.removal.keep)
    assert reconstruction is not None
    assert means is not None
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = (factor.to(device, dtype) for factor in (reconstruction.left, reconstruction.right))
    rows = by_axis[0].keep.to(device) if 0 in by_axis else None
    gone = ops.gather_slices(
        [weight], rows, cut.pruned.to(device), rows=weight.shape[0], columns=weight.shape[1]
    )[0][0].to(dtype)  # fmt: skip
    if new.dim() == 2 and cut.layout.entries == 1 and new.dtype == dtype:
        projected = gone @ left
        new.addmm_(projected, right)
        return projected.double() @ (reconstruction.right.to(device) @ means.to(device))
    # (rows, outer, neurons, inner · filter): a neuron's entries and the taps of its filter are taken over alike.
    gone = gone.reshape(len(gone), cut.layout.outer, left.shape[0], -1).transpose(2, 3)
    change = ((gone @ left) @ right).transpose(2, 3)
    new.copy_((new.to(dtype) + change.reshape(new.shape)).to(new.dtype))
    return change.double().reshape(len(gone), means.numel(), -1).sum(2) @ means.to(device)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Filters of a channels_last model stay so."""
    if not tensor.is_contiguous():
        for dimensions, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if tensor.dim() == dimensions and tensor.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def _shifted(target: StoredTensor, values: Tensor, shift: Tensor, *, role: str) -> Tensor:
    """A bias takes the shift up; a running mean, which is subtracted, takes up its opposite."""
    shift = shift.to(values.device)
    shifted = (values.double() - shift if target.attribute == "running_mean" else values.double() + shift).to(
        values.dtype
    )
    if not bool(shifted.isfinite().all()):
        raise ValueError(f"{role}: compensating for pruned neurons makes {target.name} infinite or NaN")
    return shifted
