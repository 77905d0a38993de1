"""Forward hooks that keep the activations of each layer's neurons from the latest forward pass.

A further hook explains why a state of other widths cannot be loaded.

The activations that are kept belong to the logits that the loss is about to get. So a pass without gradients
(validation) does not replace activations that were not read yet, and neither does a checkpoint's recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kddp_ext.pruning.tracing.recording import first_argument
from kddp_ext.pruning.tracing.structure import ReadValue, count_neurons

# A dropout's hook stores its input under this attribute of its output, for the reader behind it.
_BEFORE_DROPOUT = "_kddp_before_dropout"


class ActivationHooks:
    """The hooks of one pruner, and the latest activations of each value.

    The hooks hold the activations and not the pruner, so a model does not keep a pruner alive. A copied or unpickled
    model gets hooks that do nothing, because its activations are not those of the model that is pruned.
    """

    def __init__(self, model: nn.Module, values: Sequence[ReadValue]) -> None:
        self._hooks: dict[str, _ReaderHook] = {}
        self._handles = [model.register_load_state_dict_pre_hook(_LoadHook())]
        for value in values:
            for name in value.dropouts:
                module = model.get_submodule(name)
                self._handles.append(module.register_forward_hook(_DropoutHook(), with_kwargs=True))
            hook = self._hooks[value.module] = _ReaderHook(value.calls, dropouts=len(value.dropouts))
            reader = model.get_submodule(value.module)
            self._handles.append(reader.register_forward_pre_hook(hook, with_kwargs=True))

    def values(self, read: ReadValue, name: str) -> list[tuple[Tensor, int]]:
        """The latest activations of a value, which messages call `name`, and the dimension of its neurons, by call.

        Where the neurons have several entries, the shape is (samples, outer, units, inner): all other dimensions are
        samples. Empty before a forward pass.
        """
        values = self._hooks[read.module].read(name)
        if values and len(values) != read.calls:
            raise RuntimeError(
                f"activations: {read.module} was called {len(values)} times in the latest forward pass, but "
                f"{read.calls} times when it was traced"
            )
        return [self._along_neurons(read, value) for value in values]

    def _along_neurons(self, read: ReadValue, value: Tensor) -> tuple[Tensor, int]:
        layout = read.layout
        if value.dim() != read.dimensions or value.shape[layout.axis] != read.units * layout.entries:
            raise RuntimeError(
                f"activations: {read.module} was traced with an input of {read.dimensions} dimensions and "
                f"{count_neurons(read.units)}, which have {read.units * layout.entries} entries along dimension "
                f"{layout.axis}; now its shape is {tuple(value.shape)}"
            )
        if layout.entries == 1:
            return value, layout.axis
        samples = value.movedim(layout.axis, -1).flatten(0, -2)
        return samples.unflatten(1, (layout.outer, read.units, layout.inner)), 2

    def latest(self, read: ReadValue) -> Tensor:
        """The latest activations of a value's first call in their own shape; there must have been a forward pass."""
        return self._hooks[read.module].values[0]

    def clear(self) -> None:
        for hook in self._hooks.values():
            hook.clear()

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()


class Hook:
    """A hook. Its copies do nothing, and a pickled model does not need this package for them."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (nullcontext(), "__exit__")  # a function of any arguments that returns None


class _ReaderHook(Hook):
    def __init__(self, calls: int, dropouts: int) -> None:
        self.values: list[Tensor] = []  # of the calls of the latest pass
        self._calls, self._dropouts = calls, dropouts
        self._is_unread = self._is_ambiguous = False
        self._is_complete = True  # the next call begins another pass

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = first_argument(args, kwargs)
        if _is_replayed(value) or (self._is_unread and not torch.is_grad_enabled()):
            return
        for _ in range(self._dropouts):
            value = getattr(value, _BEFORE_DROPOUT, value)
        # Flags and not a counter: torch.compile would compile the model anew for each value of a counter.
        if self._is_complete:
            self._is_ambiguous, self.values = self._is_unread, [value]
        else:
            self.values = [*self.values, value]
        self._is_complete = len(self.values) == self._calls
        self._is_unread = torch.is_grad_enabled()

    def read(self, name: str) -> list[Tensor]:
        """The values of the latest forward pass."""
        self._is_unread, self._is_complete = False, True
        if self._is_ambiguous:
            raise RuntimeError(
                f"activations: more than one forward pass with gradients has reached {name} since they were last read, "
                "and only the latest is known; read pruner.activations after each pass, run passes that need no loss "
                "under torch.no_grad(), or join several views into one batch"
            )
        return self.values

    def clear(self) -> None:
        self.values = []
        self._is_unread, self._is_ambiguous, self._is_complete = False, False, True


class _DropoutHook(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        source = first_argument(args, kwargs)
        if output is not source and not _is_replayed(source):
            setattr(output, _BEFORE_DROPOUT, source)


class _LoadHook(Hook):
    """Adds to the error of load_state_dict that a state of other widths was saved before or after a prune."""

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object, _strict: bool, *lists: list[str]
    ) -> None:
        for name, own in module.named_parameters():
            saved = getattr(state.get(prefix + name), "shape", own.shape)
            # Pruning changes sizes and not the number of dimensions.
            if len(saved) == own.dim() and saved != own.shape:
                lists[-1].append(
                    f"a DynamicPruner prunes this model: {prefix}{name} is {tuple(own.shape)} here and {tuple(saved)} "
                    "in the state, which was saved at other widths. Save pruner.history with each state, and load it "
                    "into a new model after PruningHistory.replay. A moving average is pruned together with the model "
                    "if the pruner gets copies=[ema]."
                )
                return


def _is_replayed(value: Tensor) -> bool:
    """True while a pruner traces the model, and in a checkpoint's recomputation inside a backward."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return is_fake(value) or torch._C._current_graph_task_id() != -1


def is_fake(value: Tensor) -> bool:
    """True while a pruner traces the model."""
    return isinstance(value, FakeTensor)
