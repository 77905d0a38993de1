"""The model as a graph of aten operations, and which stored tensor each of them reads.

torch.export rather than torch.fx: it brings functional and module spelling to the same operations, follows
Python control flow by running it, and sees inside the containers of torch.nn.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kddp_ext import ops


class Refusal(Exception):  # noqa: N818 - it never reaches a user
    """Why the neurons of a layer cannot be proven prunable; `UnsupportedModelError` is made of it."""


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or a buffer, by the module that holds it."""

    module: str
    attribute: str

    @property
    def name(self) -> str:
        """Its name in the model's state_dict."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


class OperationGraph:
    """One run of a model's forward pass, in training or in evaluation mode, as aten operations.

    The run is on fake tensors: no arithmetic happens, and parameters, buffers, attributes, train/eval modes
    and the random state are left as they were.

    Args:
        model: the model.
        example_inputs: the positional arguments of its forward.
        training: the mode every module is traced in.

    Raises:
        Refusal: torch.export cannot follow the forward pass.
    """

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...], *, training: bool) -> None:
        self.model = model
        self.training = training
        with unchanged_modules(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _set_mode(model, training)
            try:
                program = torch.export.export(model, example_inputs, strict=False)
            except Exception as error:  # whatever the user's forward raises on these inputs
                mode = "training" if training else "evaluation"
                raise Refusal(
                    f"the forward pass could not be traced in {mode} mode with example_inputs: "
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                ) from error
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.nodes: list[Node] = list(program.graph.nodes)
        self.constants: dict[str, Any] = dict(program.constants)
        self._stored = {node: names[node.name] for node in self.nodes if node.name in names}
        self._holders = _holders(model)
        # A module registered under several names goes by its first, whichever one torch.export chose.
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}

    def stored(self, node: Any) -> StoredTensor | None:
        """The parameter or buffer that `node` stands for, None where it is a computed value."""
        name = self._stored.get(node)
        if name is None:
            return None
        module, _, attribute = name.rpartition(".")
        return StoredTensor(self._names[self.model.get_submodule(module)], attribute)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor itself."""
        value = getattr(self.model.get_submodule(stored.module), stored.attribute)
        assert isinstance(value, Tensor)
        return value

    def own(self, node: Any, role: str) -> StoredTensor:
        """The stored tensor behind `node`, proven to be read by this one operation and held by one module.

        Args:
            node: an argument of an operation.
            role: what it is, for the message: "weight of fc1".

        Raises:
            Refusal: it is computed, shared, or read more than once.
        """
        stored = self.stored(node)
        if stored is None:
            raise Refusal(
                f"the {role} is computed in the forward pass (parametrized, weight-normed or masked?), so no "
                "stored tensor can be sliced; remove the parametrization first"
            )
        tensor = self.tensor(stored)
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise Refusal(f"the {role} is a {type(tensor).__name__}; only plain dense tensors can be sliced")
        holders = self._holders[ops.storage_key(tensor)]
        if len(holders) > 1:
            raise Refusal(f"the {role} is shared (tied) between {' and '.join(sorted(holders))}; untie it first")
        readers = [user for other in self._stored for user in other.users if self._reads(other, tensor)]
        if len(readers) > 1:
            places = sorted({self.place(reader) for reader in readers})
            raise Refusal(
                f"the {role} is used {len(readers)} times in one forward pass (in {', '.join(places)}); give "
                "each use a module of its own"
            )
        return stored

    def _reads(self, node: Node, tensor: Tensor) -> bool:
        stored = self.stored(node)
        return stored is not None and self.tensor(stored) is tensor

    def module(self, node: Node) -> str:
        """Name of the innermost module whose forward runs `node`; the model itself is ''."""
        stack = node.meta.get("nn_module_stack") or {"": ("", "")}
        return self._names[self.model.get_submodule(str(list(stack.values())[-1][0]))]

    def place(self, node: Node) -> str:
        """The same, to be read by people: "act (GELU)"."""
        name = self.module(node)
        kind = type(self.model.get_submodule(name)).__name__
        return f"{name} ({kind})" if name else f"the forward of {kind}"


@contextmanager
def unchanged_modules(model: nn.Module) -> Iterator[None]:
    """Put attributes, modes, parameters and buffers back at the end, whatever was assigned in between.

    A forward pass that keeps something on `self` would otherwise keep a fake tensor.
    """
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    stores: list[dict[str, Any]] = [store for m, _ in before for store in (m._parameters, m._buffers)]
    tensors = [(store, dict(store)) for store in stores]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for store, content in tensors:
            store.clear()
            store.update(content)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, whose names are the constructor's; any other module itself.

    Raises:
        TypeError: it is no module.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
    return inner


def _set_mode(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            module.momentum = 0.1  # a cumulative average reads its counter as a number, which fake tensors lack


def _holders(model: nn.Module) -> dict[tuple[torch.device, int], set[str]]:
    """Names of all stored tensors by the memory they lie in; a module registered twice counts once."""
    holders: dict[tuple[torch.device, int], set[str]] = defaultdict(set)
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
                holders[ops.storage_key(tensor)].add(f"{prefix}.{name}" if prefix else name)
    return holders
