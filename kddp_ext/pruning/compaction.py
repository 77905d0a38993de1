"""Removes neurons from a model, its copies and its optimizers: plans and checks everything, then applies it.

The plan allocates every new tensor before anything changes. Applying it only swaps tensors and attributes and records
how to undo each step, so an error restores the previous state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


Change = tuple[Callable[[], object], Callable[[], object]]
"""A function that makes a change, and one that undoes it. Neither allocates memory of size."""


def assign(holder: object, attribute: str, value: Any) -> Change:
    """The change that sets an attribute."""
    return partial(setattr, holder, attribute, value), partial(setattr, holder, attribute, getattr(holder, attribute))


@dataclass
class CompactionPlan:
    """Everything that a compaction changes, ready to be applied. `plan_compaction` makes it."""

    changes: list[Change]
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @torch.inference_mode(False)  # tensors made in inference mode could not be trained
    def apply(self, refresh: Sequence[Callable[[], object]] = ()) -> None:
        """Make all changes, and call `refresh`, the functions that update whatever else depends on the tensors.

        Any error, KeyboardInterrupt too, restores the previous state.
        """
        self._undo += refresh
        try:
            for change, undo in self.changes:
                self._undo.append(undo)
                change()
            for function in refresh:
                function()
        except BaseException:
            self.undo()
            raise

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Restore the state before `apply`, and call its `refresh` again."""
        while self._undo:
            self._undo.pop()()


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
    changes = _plan_module(model, removals, optimizers, role="model")
    for index, each in enumerate(copies):
        changes += _plan_module(each, removals, (), role=f"copies[{index}]")
    return CompactionPlan(changes)


def _plan_module(
    model: nn.Module, removals: Sequence[Removal], optimizers: Sequence[Optimizer], *, role: str
) -> list[Change]:
    """The changes to one module; messages call it `role`."""
    cuts: dict[StoredTensor, dict[int, _Cut]] = {}
    changes: list[Change] = []
    for removal in removals:
        for slices in removal.group.slices:
            cuts.setdefault(slices.stored, {})[slices.layout.axis] = _Cut(removal, slices.layout)
        for count in removal.group.counts:
            size = int(removal.keep.numel()) * count.entries
            changes.append(assign(model.get_submodule(count.module), count.attribute, size))

    new: dict[StoredTensor, tuple[Tensor, Tensor | None]] = {}  # values and gradients
    shifts: list[tuple[StoredTensor, Tensor]] = []
    for stored, by_axis in cuts.items():
        for cut in by_axis.values():
            tensor = NeuronSlices(stored, cut.layout).tensor(model, cut.removal.group, role=role)
        values, gradient, state_changes, shift = _plan_tensor(stored, tensor, by_axis, optimizers)
        new[stored] = values, gradient
        changes += state_changes
        read = by_axis[1].removal if 1 in by_axis else None
        if read is None or read.means is None:
            continue
        reader = next(reader for reader in read.group.readers if reader.weight == stored)
        if read.reconstruction is not None:
            shift = shift - apply_reconstruction(values, tensor, by_axis)
        if reader.shift is not None:
            shifts.append((reader.shift, shift))
    for target, shift in shifts:
        tensor = target.of(model)
        values, gradient = new.get(target, (tensor.data, tensor.grad))
        new[target] = _shifted(target, values, shift, role=role), gradient
    for stored, (values, gradient) in new.items():
        tensor = stored.of(model)
        undo = partial(set_data, tensor, tensor.data, tensor.grad)
        changes.append((partial(set_data, tensor, values, gradient), undo))
    return changes


def _plan_tensor(
    stored: StoredTensor, tensor: Tensor, by_axis: Mapping[int, _Cut], optimizers: Sequence[Optimizer]
) -> tuple[Tensor, Tensor | None, list[Change], Tensor]:
    """The sliced tensor, its gradient, the changes of its optimizer state; and W2[:, p] · E[h_p], (kept rows,)."""
    # One call gathers everything of the tensor's shape. Factored moments have length 1 along some dimensions, which
    # stay; other state may be on another device.
    alike: list[tuple[dict[Any, Any], Any]] = []  # an optimizer's state of the tensor, and a key
    others: list[tuple[dict[Any, Any], Any]] = []
    for optimizer in optimizers:
        for key, value in sliceable_state(stored, tensor, optimizer).items():
            same = value.shape == tensor.shape and value.device == tensor.device
            (alike if same else others).append((optimizer.state[tensor], key))
    gradients = [] if tensor.grad is None else [tensor.grad]
    (new, *rest), shift = _gather([tensor.data, *gradients, *(state[key] for state, key in alike)], by_axis)
    gradient = rest.pop(0) if gradients else None
    sliced = [(state, key, value) for (state, key), value in zip(alike, rest, strict=True)]
    for state, key in others:
        present = {axis: cut for axis, cut in by_axis.items() if state[key].shape[axis] != 1}
        sliced.append((state, key, _gather([state[key]], present, compensate=False)[0][0]))
    changes: list[Change] = [
        (partial(state.update, {key: value}), partial(state.update, {key: state[key]})) for state, key, value in sliced
    ]
    return new, gradient, changes, shift


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
    own, copied = _structure(model), _structure(copy)
    for name in [*own, *copied]:
        got, expected = (each.get(name, "missing") for each in (copied, own))
        if got != expected:
            raise ValueError(f"{role}: {name or 'it'} is {got}, but {expected} in the model")


def _structure(module: nn.Module) -> dict[str, str]:
    """The class of each module and the shape of each tensor, by name."""
    modules = module.named_modules(remove_duplicate=False)
    classes = {name: f"{type(each).__module__}.{type(each).__qualname__}" for name, each in modules}
    return classes | {name: f"of shape {tuple(each.shape)}" for name, each in _tensors(module).items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
