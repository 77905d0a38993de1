"""Forward hooks that keep the activations of each layer's neurons from the latest forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kddp_ext.pruning.tracing.groups import NeuronGroup, count_neurons

# A dropout's hook stores its input under this attribute of its output, for the reader behind it.
_BEFORE_DROPOUT = "_kddp_before_dropout"


class ActivationHooks:
    """The hooks of one pruner, and the latest activations of each group.

    The hooks hold the activations and not the pruner, so a model does not keep a pruner alive. A copied or unpickled
    model gets hooks that do nothing, because its activations are not those of the model that is pruned.
    """

    def __init__(self, model: nn.Module, groups: Iterable[NeuronGroup]) -> None:
        self._hooks: dict[str, _ReaderHook] = {}
        self._handles = []
        for group in groups:
            for name in group.dropouts:
                module = model.get_submodule(name)
                self._handles.append(module.register_forward_hook(_DropoutHook(), with_kwargs=True))
            hook = self._hooks[group.name] = _ReaderHook(dropouts=len(group.dropouts))
            reader = model.get_submodule(group.readers[0].module)
            self._handles.append(reader.register_forward_pre_hook(hook, with_kwargs=True))

    def value(self, group: NeuronGroup) -> tuple[Tensor, int] | None:
        """The latest activations and the dimension of the neurons, which is split where they have several entries."""
        value, layout = self._hooks[group.name].value, group.value
        if value is None:
            return None
        if value.dim() != group.dimensions or value.shape[layout.axis] != group.width * layout.entries:
            raise RuntimeError(
                f"activations: {group.readers[0].module} was traced with an input of {group.dimensions} dimensions and "
                f"{count_neurons(group.width)}, which have {group.width * layout.entries} entries along dimension "
                f"{layout.axis}; now its shape is {tuple(value.shape)}"
            )
        if layout.entries == 1:
            return value, layout.axis
        return value.unflatten(layout.axis, (layout.outer, group.width, layout.inner)), layout.axis + 1

    def clear(self) -> None:
        for hook in self._hooks.values():
            hook.value = None

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()


class _Hook:
    """A hook that does nothing; copies of all hooks are of this class."""

    def __call__(self, *arguments: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _ReaderHook(_Hook):
    def __init__(self, dropouts: int) -> None:
        self.value: Tensor | None = None
        self._dropouts = dropouts

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_exporting():  # another pruner traces the model with fake tensors
            return
        value = args[0] if args else kwargs["input"]
        for _ in range(self._dropouts):
            value = getattr(value, _BEFORE_DROPOUT, value)
        self.value = value


class _DropoutHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        source = args[0] if args else kwargs["input"]
        if output is not source and not torch.compiler.is_exporting():
            setattr(output, _BEFORE_DROPOUT, source)
