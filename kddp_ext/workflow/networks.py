"""Networks of the user's own: finding them, loading their weights, and checking that they fit the data set."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

from kddp_ext.workflow.config import TeacherConfig
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.errors import OptionError, WorkflowError


def build_own(option: str, network: str, info: DatasetInfo) -> nn.Module:
    """The network that `network`, MODULE:FUNCTION or MODULE:FUNCTION:WEIGHTS, stands for, with its weights.

    The function is called with `classes=`, the number of classes, if it has a parameter of this name, and without
    arguments otherwise. The current directory is searched for the module first. `option`, such as "--teacher", is
    for messages.

    Raises:
        WorkflowError: the module, the function, the weights or the output of the network is not what is needed.
    """
    name, *rest = network.split(":", 2)
    if not name or not rest or not rest[0]:
        raise WorkflowError(f"{option}: expected MODULE:FUNCTION, such as networks:small, got {network}")
    function = _find_function(option, name, rest[0])
    try:
        takes_classes = "classes" in inspect.signature(function).parameters
        model = function(classes=info.classes) if takes_classes else function()
    except Exception as error:  # the user's function can raise anything
        _refuse(f"{option} {network}: calling {rest[0]} fails", error)
    if not isinstance(model, nn.Module):
        raise WorkflowError(
            f"{option} {network}: expected {rest[0]} to return a torch.nn.Module, got {type(model).__name__}"
        )
    if rest[1:]:
        _load_weights(option, model, Path(rest[1]))
    _check_output(f"{option} {network}", model, info)
    return model


def _find_function(option: str, module_name: str, function_name: str) -> Callable[..., object]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module can raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            _refuse(f"{option}: importing {module_name} fails", error)
        raise WorkflowError(
            f"{option}: there is no module {module_name} in {os.getcwd()} or among the installed packages; "
            "give it as Python's import does, without .py"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise WorkflowError(f"{option}: there is no function {function_name} in {module.__file__ or module_name}")
    return function  # type: ignore[no-any-return]


def _load_weights(option: str, model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise WorkflowError(f"{option}: the file of the weights, {path}, does not exist")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model"):  # checkpoints of common training loops
                state = state.get(key, state) if isinstance(state, dict) else state
        if not isinstance(state, dict):
            raise TypeError(f"expected a state dict, got {type(state).__name__}")
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")  # of DistributedDataParallel
    except Exception as error:  # a damaged file can raise any kind of exception
        _refuse(f"{option}: {path} cannot be read as weights", error)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        _refuse(f"{option}: the weights in {path} do not fit the network", error)


@torch.no_grad()
def _check_output(network: str, model: nn.Module, info: DatasetInfo) -> None:
    images, training = torch.zeros(2, info.channels, info.size, info.size), model.training
    try:
        output = logits_of(model.eval()(images))
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        fits = isinstance(output, Tensor) and output.shape == (2, info.classes)
    except Exception as error:  # the user's network can raise anything
        if not isinstance(error, AttributeError) or error.name != "logits":
            _refuse(f"{network}: it fails for images of shape {tuple(images.shape)}", error)
        found, fits = f"a {type(error.obj).__name__}", False
    if not fits:
        raise WorkflowError(
            f"{network}: expected logits of shape (2, {info.classes}), for 2 images and {info.classes} classes, "
            f"got {found}"
        )
    model.train(training)


def _refuse(what: str, error: Exception) -> NoReturn:
    """Raise a WorkflowError of one line."""
    reason = " ".join(str(error).split())
    raise WorkflowError(f"{what}: {type(error).__name__}: {reason[:300]}{'…' * (len(reason) > 300)}") from error


def logits_of(output: Any) -> Tensor:
    """The logits (N, classes) in a network's output: the output itself, or its `logits` as in Transformers."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


class Renormalised(nn.Module):
    """A network that takes images as the workflow normalises them, and sees them as it wants: (x - mean) / std.

    `mean` and `std` are on the scale 0 to 1.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, info: DatasetInfo, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        data_mean, data_std = (torch.tensor(values) / 255 for values in (info.mean, info.std))
        self.register_buffer("scale", (data_std / std).view(-1, 1, 1))
        self.register_buffer("shift", ((data_mean - mean) / std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Any:
        return self.network(images * self.scale + self.shift)


def renormalised(model: nn.Module, teacher: TeacherConfig, info: DatasetInfo) -> nn.Module:
    """`model` with the normalisation that it wants, or `model` itself where nothing says which.

    That is `teacher.mean` and `teacher.std`, else those of timm's `pretrained_cfg` or `default_cfg`, else the
    attributes `mean` and `std` of the module.
    """
    mean, std = teacher.mean, teacher.std
    if not mean and not std:
        settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        mean, std = (_numbers(model, settings, key) for key in ("mean", "std"))
    if not mean and not std:
        return model
    for option, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, info.channels):
            raise OptionError(f"teacher.{option}", f"1 or {info.channels} numbers, one for each channel", [*values])
        if max(values) > 10:
            raise OptionError(f"teacher.{option}", "numbers for pixels from 0 to 1, not 0 to 255", [*values])
    return Renormalised(model, info, *(torch.tensor(values).expand(info.channels) for values in (mean, std)))


def _numbers(model: nn.Module, settings: Any, key: str) -> tuple[float, ...]:
    """The numbers in `settings` or in the attribute `key` of `model`; none if there is something else."""
    found = settings.get(key) if isinstance(settings, dict) else getattr(model, key, None)
    if isinstance(found, Tensor):
        found = found.detach().flatten().tolist()
    if isinstance(found, Sequence) and all(isinstance(value, int | float) for value in found):
        return tuple(map(float, found))
    return ()
