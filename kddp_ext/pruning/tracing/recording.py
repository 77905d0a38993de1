"""One run of the forward pass, recorded as aten operations on fake tensors.

Nothing is computed, and nothing is allocated beyond shapes. aten operations are recorded instead of Python calls
because functions and modules lead to the same operations, and because Python's control flow is followed by running it.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from kddp_ext.pruning.tracing.structure import StoredTensor


class UnsupportedModelError(ValueError):
    """A model or a requested layer cannot be proven prunable."""


@dataclass
class ModuleCall:
    """One call of a module's forward. Tensors have versions, because in-place operations change their values."""

    module: str
    caller: ModuleCall | None
    input: tuple[Tensor, int] | None  # the first argument and its version, if it is a tensor
    output: tuple[Tensor, int] | None = None

    @property
    def stack(self) -> Iterator[ModuleCall]:
        """This call and its callers, outwards."""
        call: ModuleCall | None = self
        while call is not None:
            yield call
            call = call.caller


@dataclass(eq=False)
class Operation:
    """An aten operation that was run: its arguments and outputs contain fake tensors."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]  # the tensors among the arguments
    outputs: list[Tensor]
    call: ModuleCall  # of the innermost module

    @property
    def name(self) -> str:
        """'relu' for aten.relu.default and for the in-place aten.relu_.default."""
        return self.target._schema.name.removeprefix("aten::").rstrip("_")

    @property
    def title(self) -> str:
        """The name for messages, without what only distinguishes aten's variants: 'max_pool2d', 'layer_norm'."""
        return self.name.removeprefix("_").removeprefix("native_").removesuffix("_with_indices")

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by the name that the operation's schema gives it."""
        for position, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)
        return default


@dataclass
class Recording:
    """The operations and module calls of a forward pass, in their order, and the tensors that it returns."""

    operations: list[Operation] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    additional: set[int] = field(default_factory=set)  # the ids of those that models of transformers return with logits
    stored: dict[int, StoredTensor] = field(default_factory=dict)  # by the id of the fake parameter or buffer
    fakes: list[Tensor] = field(default_factory=list)  # keeps the ids above valid
    unfinished: ModuleCall | None = None  # where the forward pass failed: the innermost module call then


class Recorder:
    """Records a model's forward pass for one set of example inputs; the fake tensors are made once.

    Parameters, buffers, attributes, modes and the random state of the model stay as they are.

    Attributes:
        latest: the latest recording, which is incomplete where the forward pass failed.
    """

    latest: Recording

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model = model
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[tuple[StoredTensor, tuple[int, ...]], Tensor] = {}
        self._inputs, self._kwargs = _fake((inputs, dict(kwargs)), self._mode)

    def record(self, *, training: bool, shapes: Mapping[StoredTensor, Sequence[int]] | None = None) -> Recording:
        """Run the forward pass in training or evaluation mode.

        Args:
            training: the mode.
            shapes: sizes of parameters and buffers instead of their own.

        Raises:
            UnsupportedModelError: the forward pass failed.
        """
        recording, mode = Recording(), "training" if training else "evaluation"
        self.latest = recording
        with unchanged_modules(self.model), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            _set_mode(self.model, training)
            self._fake_tensors(recording, shapes or {})
            try:
                with _eagerly(), _recorded_calls(self.model, recording), self._mode, _RecordingMode(recording):
                    outputs = self.model(*self._inputs, **self._kwargs)
            except Exception as error:  # whatever the user's forward raises on these inputs
                message = str(error).strip().splitlines()[0] if str(error).strip() else ""
                raise UnsupportedModelError(
                    f"the forward pass could not be traced in {mode} mode with example_inputs: "
                    f"{type(error).__name__}: {message}"
                ) from error
        recording.outputs = tensors_in(outputs)
        if isinstance(outputs, Mapping) and "logits" in outputs:
            others = {name: each for name, each in outputs.items() if name not in ("logits", "loss")}
            recording.additional = set(map(id, tensors_in(others)))
        return recording

    def _fake_tensors(self, recording: Recording, shapes: Mapping[StoredTensor, Sequence[int]]) -> None:
        """Replace all parameters and buffers of the model by fake ones."""
        made: dict[int, Tensor] = {}
        for prefix, module in self.model.named_modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        stored = StoredTensor(prefix, name)
                        fake = made[id(tensor)] = self._fake_stored(stored, tensor, shapes.get(stored, tensor.shape))
                        recording.stored[id(fake)] = stored
                        recording.fakes.append(fake)
                    store[name] = made[id(tensor)]

    def _fake_stored(self, stored: StoredTensor, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A fake tensor like a stored one, of another shape if need be; one that was made before is used again."""
        key = (stored, tuple(shape))
        if key not in self._made:
            order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)  # as channels_last has it
            empty = torch.empty_permuted(tuple(shape), order, dtype=tensor.dtype, device="meta")
            fake = FakeTensor(self._mode, empty, tensor.device)
            if isinstance(tensor, nn.Parameter):
                fake.requires_grad_(tensor.requires_grad)
                fake._is_param = True  # what isinstance(fake, nn.Parameter) asks
            self._made[key] = fake
        return self._made[key]


class _RecordingMode(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _batch_norm(*args) if func is torch.ops.aten.native_batch_norm.default else func(*args, **kwargs)
        outputs = tensors_in(result)
        if outputs:  # others ask for a property of a tensor
            inputs = tensors_in((args, kwargs))
            call = self._recording.calls[-1]  # the innermost open one, see `_recorded_calls`
            self._recording.operations.append(Operation(func, args, kwargs, inputs, outputs, call))
        return result


def _batch_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes that native_batch_norm returns; torch finds them by running its formulas for every new shape."""
    channels, training = x.shape[1], arguments[4]
    for each in arguments[:4]:
        if each is not None and tuple(each.shape) != (channels,):
            raise RuntimeError(f"batch_norm: expected {channels} channels, got the shape {tuple(each.shape)}")
    statistics = x.new_empty((channels if training else 0,))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


@contextmanager
def _recorded_calls(model: nn.Module, recording: Recording) -> Iterator[None]:
    """Record the calls of the model's modules. `recording.calls` is the stack of open calls until the end."""
    root = ModuleCall("", None, None)
    finished = []
    recording.calls.append(root)

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = first_argument(args, kwargs)
        version = (first, first._version) if isinstance(first, Tensor) else None
        recording.calls.append(ModuleCall(name, recording.calls[-1], version))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = recording.calls.pop()
        call.output = (output, output._version) if isinstance(output, Tensor) else None
        finished.append(call)

    handles = []
    for name, module in list(model.named_modules())[1:]:
        handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        recording.unfinished = recording.calls[-1]
        recording.calls[:] = [root, *finished]


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer reads: its first argument, or the one of these names that is passed by name; None without one."""
    names = ("input", "query", "hidden_states", "x")
    return args[0] if args else next((kwargs[name] for name in names if name in kwargs), None)


def check_example_inputs(example_inputs: object) -> None:
    """Raise a TypeError unless they are a tuple."""
    if not isinstance(example_inputs, tuple):
        raise TypeError(
            "example_inputs: expected a tuple of the forward's positional arguments, such as (images[:2],), got "
            f"{type(example_inputs).__name__}"
        )


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses; other objects, such as caches, are skipped."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, each.name) for each in fields(value)]
    if not isinstance(value, tuple | list):
        return []
    return [tensor for each in value if type(each) not in _PLAIN for tensor in tensors_in(each)]


_PLAIN = (int, float, bool, str, type(None))


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value.clone() if value.is_inference() else value.detach())
    if isinstance(value, tuple | list):
        items = [_fake(each, mode) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _fake(each, mode) for key, each in value.items()}
    return value


@contextmanager
def _eagerly() -> Iterator[None]:
    """Run functions that torch.compile wrapped without compiling them, and log no errors of fake tensors."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        logger.disabled = before


@contextmanager
def unchanged_modules(model: nn.Module) -> Iterator[None]:
    """Restore attributes, modes, parameters and buffers at the end; a forward may store fake tensors on `self`.

    The content of dictionaries and lists that are attributes is restored too: some networks keep a cache in them.
    """
    attributes = [each for module in model.modules() for each in (module.__dict__, module._parameters, module._buffers)]
    containers = [each for module in model.modules() for each in vars(module).values() if type(each) in (dict, list)]
    before = [(each, each.copy()) for each in [*attributes, *containers]]
    try:
        yield
    finally:
        for container, content in before:
            container.clear()
            if isinstance(container, dict):
                container.update(content)
            else:
                container.extend(content)


class TracedModules:
    """The names of a model's tensors when it was traced, and the modules that are observed."""

    def __init__(self, model: nn.Module, observed: Iterable[str]) -> None:
        self._observed = {name: weakref.ref(model.get_submodule(name)) for name in observed}
        self._tensors = _tensor_names(model)

    def require_unchanged(self, model: nn.Module) -> None:
        """Raise a ValueError where a tensor was added or removed, or an observed module was replaced since."""
        changed = sorted(self._tensors ^ _tensor_names(model))
        modules = dict(model.named_modules())
        replaced = [name for name, module in self._observed.items() if modules.get(name) is not module()]
        if changed or replaced:
            what = f"{changed[0]} was added or removed" if changed else f"{replaced[0]} is another module"
            raise ValueError(
                f"model: {what} since the pruner was made; make a new pruner after changing the model, and load this "
                "one's state_dict() where the widths are the same"
            )


def _tensor_names(model: nn.Module) -> set[str]:
    return {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DistributedDataParallel and moving averages, in any order of nesting."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel | AveragedModel):
        return unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # of torch.compile's wrapper
    if inner is None and type(model).__name__ in ("ModelEmaV2", "ModelEmaV3"):  # timm's moving averages
        inner = model.module
    return model if inner is None else unwrapped(inner)


def _set_mode(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            module.momentum = 0.1  # a cumulative average reads its counter as a number, which fake tensors lack
