"""Removes neurons from a model, its copies and its optimizers: plans and checks everything, then applies it.

The plan allocates every new tensor before anything changes. Applying it only swaps tensors and attributes and records
how to undo each step, so an error restores the previous state.
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
from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.reconstruction import Reconstruction
from kddp_ext.pruning.tracing.graph import unwrapped
from kddp_ext.pruning.tracing.groups import NeuronGroup, NeuronSlices, StoredTensor, all_but


@dataclass(frozen=True)
class Removal:
    """Neurons of one group to be removed.

    `means` are float64, of each neuron, (width,), or of each of its entries in the value that the next layer reads,
    (width, entries). The mean contribution of the removed neurons is added to that layer; None: no compensation. The
    `reconstruction` of the removed neurons, if any, is added to the next layer's weights; it needs `means`.
    """

    group: NeuronGroup
    keep: Tensor  # ascending int64 indices of the neurons that stay, at least one
    means: Tensor | None = None
    reconstruction: Reconstruction | None = None

    @property
    def pruned(self) -> Tensor:
        """Ascending int64 indices of the neurons to be removed."""
        return all_but(self.keep, self.group.width)


@dataclass(frozen=True)
class _Cut:
    """A removal along one dimension of a tensor; `keep` and `pruned` are ascending int64 indices of its entries."""

    removal: Removal
    layout: Layout

    @property
    def keep(self) -> Tensor:
        return self.layout.indices(self.removal.keep, self.removal.group.width)

    @property
    def pruned(self) -> Tensor:
        return self.layout.indices(self.removal.pruned, self.removal.group.width)

    def means(self, neurons: Tensor) -> Tensor | None:
        """The mean values of the entries of `neurons`, float64; None without compensation."""
        if self.removal.means is None:
            return None
        means = self.removal.means[neurons]
        outer, inner = self.layout.outer, self.layout.inner
        entries = means.view(len(means), -1).expand(-1, outer * inner)
        return entries.reshape(len(means), outer, inner).transpose(0, 1).flatten()


@dataclass
class _TensorPlan:
    """The new values of one parameter or buffer, of its gradient, and of its tensors in optimizer states."""

    tensor: Tensor
    new: Tensor
    new_grad: Tensor | None
    new_state: list[tuple[dict[Any, Any], Any, Tensor]]  # an optimizer's state of the tensor, the key, the new value


_Attribute = tuple[object, str, Any]  # an object, the name of its attribute, the new value


@dataclass
class CompactionPlan:
    """Everything that a compaction changes, ready to be applied. `plan_compaction` makes it."""

    _tensors: list[_TensorPlan]
    _attributes: list[_Attribute]

    @torch.inference_mode(False)  # tensors made in inference mode could not be trained
    def apply(
        self,
        also: Sequence[_Attribute] = (),
        *,
        refresh: Sequence[Callable[[], object]] = (),
        confirm: Callable[[], object] | None = None,
    ) -> None:
        """Apply the plan, and set the attributes `also`. Any error, KeyboardInterrupt too, restores the previous state.

        The functions `refresh` update whatever else depends on the tensors; they are called after the change, and again
        after a change is undone. `confirm` is called last, and its error undoes the change too.
        """
        undo: list[Callable[[], object]] = [*refresh]
        try:
            for plan in self._tensors:
                undo.append(partial(set_data, plan.tensor, plan.tensor.data, plan.tensor.grad))
                set_data(plan.tensor, plan.new, plan.new_grad)
                for state, key, value in plan.new_state:
                    undo.append(partial(state.__setitem__, key, state[key]))
                    state[key] = value
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


def set_data(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give a parameter or buffer data of another shape; its identity and hooks stay.

    The node that accumulates its gradient remembers the shape, so the next backward would fail. torch drops the node
    when the tensor is given data of another dtype (`VariableHooks::set_data` in torch/csrc/autograd/variable.cpp).
    """
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    tensor.grad = None
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = grad


# --- The plan


@torch.inference_mode(False)
def plan_compaction(
    model: nn.Module,
    removals: Sequence[Removal],
    optimizers: Sequence[Optimizer] = (),
    copies: Sequence[nn.Module] = (),
) -> CompactionPlan:
    """Plan the removal of neurons from a model, its optimizers' state and its copies; nothing is changed.

    The means are compensated in a copy through the copy's own weights. A ValueError names a tensor that has another
    shape than the groups say.
    """
    tensors, attributes = _plan_module(model, removals, optimizers, role="model")
    for index, each in enumerate(copies):
        copied_tensors, copied_attributes = _plan_module(each, removals, (), role=f"copies[{index}]")
        tensors += copied_tensors
        attributes += copied_attributes
    return CompactionPlan(tensors, attributes)


def _plan_module(
    model: nn.Module, removals: Sequence[Removal], optimizers: Sequence[Optimizer], *, role: str
) -> tuple[list[_TensorPlan], list[_Attribute]]:
    """The changes to one module; messages call it `role`."""
    cuts: dict[StoredTensor, dict[int, _Cut]] = {}
    attributes: list[_Attribute] = []
    for removal in removals:
        for slices in removal.group.slices:
            cuts.setdefault(slices.stored, {})[slices.layout.axis] = _Cut(removal, slices.layout)
        for count in removal.group.counts:
            size = int(removal.keep.numel()) * count.entries
            attributes.append((model.get_submodule(count.module), count.attribute, size))

    plans: dict[StoredTensor, _TensorPlan] = {}
    shifts: list[tuple[StoredTensor, Tensor]] = []
    for stored, by_axis in cuts.items():
        for cut in by_axis.values():
            tensor = NeuronSlices(stored, cut.layout).tensor(model, cut.removal.group, role=role)
        plans[stored], shift = _plan_tensor(stored, tensor, by_axis, optimizers)
        read = by_axis[1].removal if 1 in by_axis else None
        if read is None or read.means is None:
            continue
        reader = next(reader for reader in read.group.readers if reader.weight == stored)
        if read.reconstruction is not None:
            shift = shift - apply_reconstruction(plans[stored].new, tensor, by_axis)
        if reader.shift is not None:
            shifts.append((reader.shift, shift))
    for target, shift in shifts:
        if target not in plans:
            tensor = target.of(model)
            plans[target] = _TensorPlan(tensor, tensor.data, tensor.grad, [])
        plans[target].new = _shifted(target, plans[target].new, shift, role=role)
    return list(plans.values()), attributes


def _plan_tensor(
    stored: StoredTensor, tensor: Tensor, by_axis: Mapping[int, _Cut], optimizers: Sequence[Optimizer]
) -> tuple[_TensorPlan, Tensor]:
    """The sliced tensor with its gradient and optimizer state; and W2[:, p] · E[h_p], (kept rows,) float64."""
    states = [
        (optimizer.state[tensor], key, value)
        for optimizer in optimizers
        for key, value in sliceable_state(stored, tensor, optimizer).items()
    ]
    # One call gathers everything of the tensor's shape. Factored moments have length 1 along some dimensions, which
    # stay; other state may be on another device.
    alike = [value for _, _, value in states if value.shape == tensor.shape and value.device == tensor.device]
    gathered, shift = _gather([tensor.data, *([] if tensor.grad is None else [tensor.grad]), *alike], by_axis)
    new, *rest = gathered
    new_grad = rest.pop(0) if tensor.grad is not None else None
    new_state = []
    for state, key, value in states:
        if value.shape == tensor.shape and value.device == tensor.device:
            sliced = rest.pop(0)
        else:
            present = {axis: cut for axis, cut in by_axis.items() if value.shape[axis] != 1}
            sliced = _gather([value], present, compensate=False)[0][0]
        new_state.append((state, key, sliced))
    return _TensorPlan(tensor, new, new_grad, new_state), shift


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


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for the filters of a channels_last model."""
    if not tensor.is_contiguous():
        for dimensions, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if tensor.dim() == dimensions and tensor.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def apply_reconstruction(new: Tensor, weight: Tensor, by_axis: Mapping[int, _Cut]) -> Tensor:
    """Add W2[:, p] A to `new`, the sliced `weight`; return what this adds to the layer's mean output, (kept rows,)."""
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
    # (rows, outer, neurons, inner · filter): all entries of a neuron and all taps of its filter change alike.
    gone = gone.reshape(len(gone), cut.layout.outer, left.shape[0], -1).transpose(2, 3)
    change = ((gone @ left) @ right).transpose(2, 3)
    new.copy_((new.to(dtype) + change.reshape(new.shape)).to(new.dtype))
    return change.double().reshape(len(gone), means.numel(), -1).sum(2) @ means.to(device)


def _shifted(target: StoredTensor, values: Tensor, shift: Tensor, *, role: str) -> Tensor:
    """Add the shift to a bias, or subtract it from a running mean, which is itself subtracted."""
    sign = -1 if target.attribute == "running_mean" else 1
    shifted = (values.double() + sign * shift.to(values.device)).to(values.dtype)
    if not bool(shifted.isfinite().all()):
        raise ValueError(f"{role}: compensating for removed neurons makes {target.name} infinite or NaN")
    return shifted


# --- Optimizers


def require_sliceable_optimizer(optimizer: Optimizer) -> None:
    """Raise a ValueError for an optimizer whose state is not stored parameter by parameter."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS keeps one flat history of all parameters, which cannot be sliced")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError("optimizer: SparseAdam takes sparse gradients only, but those of pruned layers are dense")
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "optimizer: ZeroRedundancyOptimizer keeps each parameter's state on one rank only, so the other ranks "
            "cannot slice it; use a plain optimizer on every rank"
        )


def sliceable_state(stored: StoredTensor, tensor: Tensor, optimizer: Optimizer) -> dict[Any, Tensor]:
    """The tensors in an optimizer's state of the parameter `tensor` that have its dimensions, by key; no scalars."""
    sliceable = {}
    for key, value in optimizer.state.get(tensor, {}).items():
        if value is None or isinstance(value, int | float | str) or (isinstance(value, Tensor) and value.dim() == 0):
            continue
        fits = isinstance(value, Tensor) and value.layout == torch.strided and value.dim() == tensor.dim()
        if not fits or not all(a in (1, b) for a, b in zip(value.shape, tensor.shape, strict=True)):
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps {key!r} of {stored.name}, {kind}, and the pruner does "
                f"not know how it follows the parameter's shape {tuple(tensor.shape)}; nothing was pruned"
            )
        sliceable[key] = value
    return sliceable


# --- Copies


def checked_copies(model: nn.Module, copies: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """The copies without their wrappers, proven to have the model's structure and their own tensors."""
    if isinstance(copies, nn.Module | str) or not isinstance(copies, Sequence):
        raise TypeError(f"copies: expected a list of modules, such as [ema_model], got {type(copies).__name__}")
    owners = {ops.storage_key(tensor): "the model" for tensor in _tensors(model).values()} if copies else {}
    found = []
    for index, copy in enumerate(copies):
        role = f"copies[{index}]"
        if not isinstance(copy, nn.Module):
            raise TypeError(f"{role}: expected a torch.nn.Module, got {type(copy).__name__}")
        inner = unwrapped(copy)
        _check_structure(model, inner, role)
        for name, tensor in _tensors(inner).items():
            owner = owners.setdefault(ops.storage_key(tensor), role)
            if owner != role:
                raise ValueError(f"{role}: it shares {name} with {owner}; a copy needs its own tensors")
        found.append(inner)
    return tuple(found)


def _check_structure(model: nn.Module, copy: nn.Module, role: str) -> None:
    kinds, copied_kinds = (
        {name: type(module) for name, module in each.named_modules(remove_duplicate=False)} for each in (model, copy)
    )
    for name in [*kinds, *copied_kinds]:
        if kinds.get(name) is not copied_kinds.get(name):
            got, expected = (found[name].__name__ if name in found else "nothing" for found in (copied_kinds, kinds))
            raise ValueError(f"{role}: {name or 'it'} is {got}, but {expected} in the model")
    shapes, copied_shapes = ({name: tuple(each.shape) for name, each in _tensors(m).items()} for m in (model, copy))
    for name in [*shapes, *copied_shapes]:
        if name not in shapes or name not in copied_shapes:
            raise ValueError(f"{role}: {name} is {'missing in it' if name in shapes else 'not in the model'}")
        if shapes[name] != copied_shapes[name]:
            raise ValueError(f"{role}: {name} has shape {copied_shapes[name]}, but {shapes[name]} in the model")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
