"""Removes neurons from a model, its copies and its optimizers: plans and checks everything, then applies it.

The plan allocates every new tensor before anything changes. Applying it only swaps tensors and attributes and records
how to undo each step, so an error restores the previous state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kddp_ext import ops
from kddp_ext.activations.layout import Layout
from kddp_ext.pruning.attention import with_removable_heads
from kddp_ext.pruning.reconstruction import Reconstruction
from kddp_ext.pruning.tracing.recording import tensors_in, unwrapped
from kddp_ext.pruning.tracing.structure import PrunableNeurons, Reader, ReadValue, RootMeanSquareNorm, StoredTensor
from kddp_ext.pruning.transfers import copied_to


@dataclass(frozen=True, eq=False)
class Removal:
    """Neurons to be removed.

    Attributes:
        neurons: all prunable neurons of the model.
        keep: a (number,) mask of the neurons that stay, at least one of each group.
        means: for each value that is read, the mean of each of its entries, (units, entries) or (units,) float64. The
            mean contribution of the removed neurons is added to the layers that read them. None: no compensation.
        reconstructions: for each value, the reconstruction of its removed units from the others, which is added to the
            weights of the layers that read it; it needs `means`. Empty: none.
    """

    neurons: PrunableNeurons
    keep: Tensor
    means: tuple[Tensor, ...] | None = None
    reconstructions: tuple[Reconstruction | None, ...] = ()

    def entry_means(self, reader: Reader, units: Tensor) -> Tensor:
        """The means of the entries of some units of the value that `reader` reads, in the order of the entries."""
        assert self.means is not None
        return self.neurons.values[reader.value].layout.in_order(self.means[reader.value][units])


def units_gone(value: ReadValue, keep: Tensor) -> Tensor:
    """A mask of the units of a value whose neurons are not in `keep`."""
    return (value.neurons >= 0) & ~keep[value.neurons.clamp(min=0)]


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
    removal: Removal,
    optimizers: Sequence[Optimizer] = (),
    copies: Sequence[nn.Module] = (),
) -> CompactionPlan:
    """Plan the removal of neurons from a model, its optimizers' state and its copies; nothing is changed.

    The means are compensated in a copy through the copy's own weights. A ValueError names a tensor that has another
    shape than it had when the model was traced.
    """
    with with_removable_heads(model, *copies):
        changes = _plan_module(model, removal, optimizers, role="model")
        for index, each in enumerate(copies):
            changes += _plan_module(each, removal, (), role=f"copies[{index}]")
        return CompactionPlan(changes)


def _plan_module(model: nn.Module, removal: Removal, optimizers: Sequence[Optimizer], *, role: str) -> list[Change]:
    """The changes to one module; messages call it `role`."""
    neurons, keep, changes = removal.neurons, removal.keep, list[Change]()
    tensors = neurons.tensors(model, role=role)
    changes += [assign(*change) for change in neurons.attributes_after(model, keep)]
    compensated = [each for each in neurons.readers if removal.means is not None and not each.computed]
    readers = {reader.weight: reader for reader in compensated}
    new: dict[StoredTensor, tuple[Tensor, Tensor | None]] = {}  # values and gradients
    shifts: list[tuple[StoredTensor, Tensor]] = []
    for stored, cut in _cuts(tensors, removal, readers).items():
        values, gradient, state_changes, shift = _plan_tensor(stored, tensors[stored], cut, optimizers)
        new[stored] = values, gradient
        changes += state_changes
        if cut.read is not None and cut.read.reconstruction is not None:
            shift = shift - apply_reconstruction(values, tensors[stored], cut.kept, cut.read)
        if cut.read is not None and cut.read.reader.shift is not None:
            shifts.append((cut.read.reader.shift, shift))
    for target, shift in shifts:
        tensor = target.of(model)
        values, gradient = new.get(target, (tensor.data, tensor.grad))
        new[target] = _shifted(target, values, shift), gradient
    _require_finite([(target, new[target][0]) for target, _ in shifts], role=role)
    for norm in neurons.norms:
        if norm.weight in new:
            _rescale(norm, *new[norm.weight], neurons.narrowing(norm, keep) ** 0.5)
    for stored, (values, gradient) in new.items():
        tensor = stored.of(model)
        undo = partial(set_data, tensor, tensor.data, tensor.grad)
        changes.append((partial(set_data, tensor, values, gradient), undo))
    return changes


def _rescale(norm: RootMeanSquareNorm, weight: Tensor, gradient: Tensor | None, scale: float) -> None:
    """Multiply the new weight of a norm by √(D/D'), in place; its gradient becomes smaller."""
    weight.copy_((weight.double() + norm.offset) * scale - norm.offset)
    if gradient is not None:
        gradient.div_(scale)


@dataclass(frozen=True)
class _Read:
    """What a reader loses, where that is compensated.

    Attributes:
        reader: it reads the removed entries along `reader.axis` of its weight.
        layout: of the value that it reads.
        pruned: the entries that go, int64.
        means: of the entries that go, float64. If not `is_plain`, of all entries, with 0 for those that stay.
        kept_means: of the entries that stay, float64.
        reconstruction: of the removed units, or None.
    """

    reader: Reader
    layout: Layout
    pruned: Tensor
    means: Tensor
    kept_means: Tensor
    reconstruction: Reconstruction | None

    @property
    def is_plain(self) -> bool:
        """Whether the weight reads along its columns, so that the gather can sum what goes."""
        return self.reader.axis == 1 and self.reader.groups == 1


@dataclass(frozen=True)
class _Cut:
    """What is removed from a tensor: the kept entries by dimension, and what is compensated."""

    kept: dict[int, Tensor]
    read: _Read | None = None


def _cuts(
    tensors: Mapping[StoredTensor, Tensor], removal: Removal, readers: Mapping[StoredTensor, Reader]
) -> dict[StoredTensor, _Cut]:
    """What is removed from each tensor that loses something, on the tensor's device; one transfer for each device."""
    cuts = dict[StoredTensor, _Cut]()
    for stored, tensor in tensors.items():
        kept, reader = removal.neurons.entries_kept(stored, removal.keep), readers.get(stored)
        if kept and reader is not None and reader.axis in kept:
            cuts[stored] = _Cut(kept, _read(reader, tensor.shape[reader.axis], kept, removal))
        elif kept:
            cuts[stored] = _Cut(kept)
    for device in dict.fromkeys(tensors[stored].device for stored in cuts):
        if device.type != "cpu":
            cuts |= copied_to({stored: cut for stored, cut in cuts.items() if tensors[stored].device == device}, device)
    return cuts


def _read(reader: Reader, size: int, kept: Mapping[int, Tensor], removal: Removal) -> _Read:
    """What a reader loses along a dimension of `size` entries."""
    value = removal.neurons.values[reader.value]
    gone = units_gone(value, removal.keep)
    going = torch.ones(size, dtype=torch.bool, device="cpu")
    going[kept[reader.axis]] = False
    made = _Read(
        reader,
        value.layout,
        going.nonzero().flatten(),
        removal.entry_means(reader, gone.nonzero().flatten()),
        removal.entry_means(reader, (~gone).nonzero().flatten()),
        removal.reconstructions[reader.value] if removal.reconstructions else None,
    )
    if made.is_plain:
        return made
    means = removal.entry_means(reader, torch.arange(value.units, device="cpu"))
    return replace(made, means=torch.where(value.layout.in_order(gone), means, 0))


def _plan_tensor(
    stored: StoredTensor, tensor: Tensor, cut: _Cut, optimizers: Sequence[Optimizer]
) -> tuple[Tensor, Tensor | None, list[Change], Tensor]:
    """The sliced tensor, its gradient, the changes of its optimizer state; and W2[:, p] · E[h_p], (kept outputs,)."""
    # One call gathers everything of the tensor's shape. Factored moments have length 1 along some dimensions, which
    # stay; other state may be on another device.
    alike: list[tuple[dict[Any, Any], Any]] = []  # an optimizer's state of the tensor, and a key
    others: list[tuple[dict[Any, Any], Any]] = []
    for optimizer in optimizers:
        for key, value in sliceable_state(stored, tensor, optimizer).items():
            same = value.shape == tensor.shape and value.device == tensor.device
            (alike if same else others).append((optimizer.state[tensor], key))
    gradients = [] if tensor.grad is None else [tensor.grad]
    (new, *rest), shift = _gather([tensor.data, *gradients, *(state[key] for state, key in alike)], cut)
    gradient = rest.pop(0) if gradients else None
    sliced = [(state, key, value) for (state, key), value in zip(alike, rest, strict=True)]
    for state, key in others:
        present = {axis: kept for axis, kept in cut.kept.items() if state[key].shape[axis] != 1}
        sliced.append((state, key, _gather([state[key]], _Cut(present))[0][0]))
    changes: list[Change] = [
        (partial(state.update, {key: value}), partial(state.update, {key: state[key]})) for state, key, value in sliced
    ]
    return new, gradient, changes, shift


def _gather(tensors: list[Tensor], cut: _Cut) -> tuple[list[Tensor], Tensor]:
    """The kept entries of tensors of one shape, and the mean contribution of what the reader loses with them."""
    first, read = tensors[0], cut.read
    keep = {axis: kept.to(first.device) for axis, kept in cut.kept.items()}  # state may be on another device
    summed = read if read is not None and read.is_plain else None
    gathered, shift = ops.gather_slices(
        tensors,
        keep.get(0),
        keep.get(1),
        rows=first.shape[0],
        columns=first.shape[1] if first.dim() > 1 else 1,
        pruned_columns=None if summed is None else summed.pruned,
        pruned_means=None if summed is None else summed.means,
        indices_in_range=True,
    )
    if read is not None and summed is None:
        shift = _mean_contribution(first, cut.kept, read)
    for axis in keep:
        if axis > 1:  # as columns of a matrix whose rows are all dimensions before
            flat = [each.contiguous().view(prod(each.shape[:axis]), each.shape[axis], -1) for each in gathered]
            rows, columns = flat[0].shape[:2]
            narrow, _ = ops.gather_slices(flat, None, keep[axis], rows=rows, columns=columns, indices_in_range=True)
            gathered = [
                new.reshape(*old.shape[:axis], -1, *old.shape[axis + 1 :])
                for old, new in zip(gathered, narrow, strict=True)
            ]
    return [
        new.contiguous(memory_format=_memory_format(old)) for old, new in zip(tensors, gathered, strict=True)
    ], shift


def _mean_contribution(weight: Tensor, kept: Mapping[int, Tensor], read: _Read) -> Tensor:
    """W2[:, p] · E[h_p] of the outputs that stay, float64, for a transposed weight or one with groups."""
    axis, groups = read.reader.axis, read.reader.groups
    means = read.means.view(groups, -1)  # of each group's entries
    taps = weight.detach().transpose(0, 1) if axis == 0 else weight.detach()
    taps = taps.double().reshape(groups, -1, means.shape[1], prod(weight.shape[2:])).sum(3)
    shift = (taps @ means[:, :, None]).flatten()
    return shift if 1 - axis not in kept else shift[kept[1 - axis]]


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for the filters of a channels_last model."""
    if not tensor.is_contiguous():
        for dimensions, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if tensor.dim() == dimensions and tensor.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def apply_reconstruction(new: Tensor, weight: Tensor, kept: Mapping[int, Tensor], read: _Read) -> Tensor:
    """Add W2[:, p] A to `new`, the sliced `weight`; return what this adds to the mean output, (kept outputs,)."""
    assert read.reconstruction is not None
    reader, layout, means = read.reader, read.layout, read.kept_means
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = (factor.to(dtype) for factor in (read.reconstruction.left, read.reconstruction.right))
    rows = kept.get(1 - reader.axis)
    if prod(weight.shape[2:]) == 1:  # a 1×1 convolution is a matrix
        weight, new = weight.view(weight.shape[:2]), new.view(new.shape[:2])
    weight, new = (each.transpose(0, 1) if reader.axis == 0 else each for each in (weight.detach(), new))
    gone = weight.index_select(1, read.pruned).to(dtype)
    gone = gone if rows is None else gone.index_select(0, rows)
    if new.dim() == 2 and layout.entries == 1 and new.dtype == dtype:
        projected = gone @ left
        new.addmm_(projected, right)
        return projected.double() @ (read.reconstruction.right @ means)
    # (outputs, outer, units, inner · filter): all entries of a unit and all taps of its filter change alike.
    gone = gone.reshape(len(gone), layout.outer, left.shape[0], -1).transpose(2, 3)
    change = ((gone @ left) @ right).transpose(2, 3)
    new.copy_((new.to(dtype) + change.reshape(new.shape)).to(new.dtype))
    return change.double().reshape(len(gone), means.numel(), -1).sum(2) @ means


def _shifted(target: StoredTensor, values: Tensor, shift: Tensor) -> Tensor:
    """Add the shift to a bias, or subtract it from a running mean, which is itself subtracted."""
    sign = -1 if target.attribute == "running_mean" else 1
    return (values.double() + sign * shift.to(values.device)).to(values.dtype)


def _require_finite(shifted: Sequence[tuple[StoredTensor, Tensor]], *, role: str) -> None:
    """Raise where a compensated bias or running mean is not finite; the host waits once for all of a device."""
    are_finite = copied_to([values.isfinite().all() for _, values in shifted], "cpu")
    for (target, _), is_finite in zip(shifted, are_finite, strict=True):
        if not bool(is_finite):
            raise ValueError(f"{role}: compensating for removed neurons makes {target.name} infinite or NaN")


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


def with_inner_optimizers(optimizers: Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    """The optimizers, and those that they hold as attributes, as Lookahead and SAM do; each state once.

    A ValueError is raised for an optimizer whose state cannot be sliced, or that keeps tensors of the parameters
    outside of its state.
    """
    found: dict[int, Optimizer] = {}
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        require_sliceable_optimizer(optimizer)
        inner = [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
        for name, value in vars(optimizer).items():
            if name not in ("state", "param_groups", "defaults") and any(each.dim() for each in tensors_in(value)):
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} keeps tensors in its attribute {name}, and the pruner does "
                    "not know how they follow the parameters; keep them in its state, by parameter"
                )
        waiting += inner
        found.setdefault(id(optimizer.state), optimizer)
    return tuple(found.values())


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
        # timm's first moving average is no module
        module = copy.ema if type(copy).__name__ == "ModelEma" else copy
        if not isinstance(module, nn.Module):
            raise TypeError(f"{role}: expected a torch.nn.Module, got {type(module).__name__}")
        inner = unwrapped(module)
        with with_removable_heads(model, inner):
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
