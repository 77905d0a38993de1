"""The model as a graph of aten operations, with the stored tensor that each of them reads.

torch.export is used instead of torch.fx because it maps functional and module spelling to the same operations, follows
Python control flow by running it, and sees inside the containers of torch.nn.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from kddp_ext import ops
from kddp_ext.pruning.tracing.groups import StoredTensor


class Refusal(Exception):  # noqa: N818 - users see UnsupportedModelError instead
    """The reason why the neurons of a layer cannot be proven prunable."""


class OperationGraph:
    """One run of a model's forward pass, in training or evaluation mode, as aten operations.

    The run uses fake tensors: nothing is computed, and parameters, buffers, attributes, modes and the random state stay
    as they are. It raises a `Refusal` where torch.export cannot follow the forward pass.
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
        # A module registered under several names goes by the first one, whichever torch.export chose.
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._stored: dict[Node, StoredTensor] = {}
        self._users: dict[int, list[Node]] = defaultdict(list)  # by the id of a stored tensor
        for node in self.nodes:
            if node.name in names:
                exported = StoredTensor.named(names[node.name])
                self._stored[node] = replace(exported, module=self._names[model.get_submodule(exported.module)])
                self._users[id(self._stored[node].of(model))].extend(node.users)
        self._holders = _holders(model)

    def stored(self, node: Any) -> StoredTensor | None:
        """The parameter or buffer behind `node`; None where it is computed."""
        return self._stored.get(node)

    def own(self, node: Any, role: str) -> StoredTensor:
        """The stored tensor behind `node`, an argument of an operation; its `role` is for messages ("weight of fc1").

        It must be held by one module and read by one operation, else a `Refusal` is raised.
        """
        stored = self.stored(node)
        if stored is None:
            raise Refusal(
                f"the {role} is computed in the forward pass (by a parametrization, weight norm or mask?), so there is "
                "no stored tensor to slice; remove the parametrization first"
            )
        tensor = stored.of(self.model)
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise Refusal(f"the {role} is a {type(tensor).__name__}; only plain dense tensors can be sliced")
        holders = self._holders[ops.storage_key(tensor)]
        if len(holders) > 1:
            raise Refusal(f"the {role} is shared (tied) between {' and '.join(sorted(holders))}; untie it first")
        users = self._users[id(tensor)]
        if len(users) > 1:
            places = sorted({self.place(user) for user in users})
            raise Refusal(
                f"the {role} is used {len(users)} times in one forward pass (in {', '.join(places)}); use a separate "
                "module for each"
            )
        return stored

    def module(self, node: Node) -> str:
        """Name of the innermost module whose forward runs `node`; '' for the model itself."""
        stack = node.meta.get("nn_module_stack") or {"": ("", "")}
        return self._names[self.model.get_submodule(str(list(stack.values())[-1][0]))]

    def place(self, node: Node) -> str:
        """The same for an error message: "act (GELU)"."""
        name = self.module(node)
        kind = type(self.model.get_submodule(name)).__name__
        return f"{name} ({kind})" if name else f"the forward of {kind}"


@contextmanager
def unchanged_modules(model: nn.Module) -> Iterator[None]:
    """Restore attributes, modes, parameters and buffers at the end; a forward may store fake tensors on `self`."""
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DistributedDataParallel and AveragedModel, in any order of nesting."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel | AveragedModel):
        return unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # of torch.compile's wrapper
    return model if inner is None else unwrapped(inner)


def _set_mode(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        module.training = training
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            module.momentum = 0.1  # a cumulative average reads its counter as a number, which fake tensors lack


def _holders(model: nn.Module) -> dict[tuple[torch.device, int], set[str]]:
    """Names of all stored tensors by their memory; a module registered twice counts once."""
    holders: dict[tuple[torch.device, int], set[str]] = defaultdict(set)
    for prefix, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
                holders[ops.storage_key(tensor)].add(StoredTensor(prefix, name).name)
    return holders
