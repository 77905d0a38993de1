"""A device without hardware, for counting how often the host waits for it.

Tensors on it compute as on the CPU. Under `Waits`, each operation that would make the host wait is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("meta")  # the only one that needs neither hardware nor a driver
aten = torch.ops.aten
# The host reads their result, or its shape.
_READS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_consecutive, aten.repeat_interleave, aten._linalg_eigh,
}  # fmt: skip


class OnDevice(Tensor):
    """A tensor of the device; `value` has its content."""

    is_meta = False

    @staticmethod
    def __new__(cls, value: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=DEVICE
        )
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Waits(TorchDispatchMode):
    """Records the operations that wait for the device, in `names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(func.overloadpacket, args, kwargs):
            self.names.append(func.overloadpacket.__name__)
        return _run(func, args, kwargs)


def on_device(tensor: Tensor) -> Tensor:
    """A copy on the device; of a parameter, a parameter with its gradient."""
    copied = OnDevice(tensor.detach().clone())
    if not isinstance(tensor, torch.nn.Parameter):
        return copied
    parameter = torch.nn.Parameter(copied)
    parameter.grad = None if tensor.grad is None else on_device(tensor.grad)
    return parameter


def _waits(packet: Any, args: Any, kwargs: Any) -> bool:
    if packet is aten._to_copy:
        return kwargs.get("device", args[0].device) != args[0].device and not kwargs.get("non_blocking")
    if packet is aten.copy_:
        return args[0].device != args[1].device
    if not any(isinstance(each, OnDevice) for each in args):
        return False
    indices = args[1] if packet in (aten.index, aten.index_put_) else ()
    return packet in _READS or any(each is not None and each.dtype == torch.bool for each in indices)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    devices = set[torch.device]()
    tree_map_only(Tensor, lambda each: devices.add(each.device), (args, kwargs))
    is_on_device = kwargs.get("device") == DEVICE if kwargs.get("device") is not None else DEVICE in devices
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrappers = dict[int, Tensor]()  # of the arguments, by their content: an operation in place returns one of them

    def content(each: OnDevice) -> Tensor:
        wrappers[id(each.value)] = each
        return each.value

    contents, options = tree_map_only(OnDevice, content, (args, kwargs))
    result = func(*contents, **options)
    if not is_on_device:
        return result
    return tree_map_only(Tensor, lambda each: wrappers[id(each)] if id(each) in wrappers else OnDevice(each), result)
