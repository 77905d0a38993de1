"""The CUDA module: whether it was built, whether it can run, and on which device and stream.

A build with CUDA must work on machines without a GPU, so nothing here calls the driver before the first CUDA tensor.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, TypedDict

import torch

_usable: set[int] = set()  # devices


class CudaBuild(TypedDict):
    """The CUDA part of `kddp_ext.build_info`."""

    cuda: bool
    cuda_architectures: list[str]
    cuda_compiler: str


@functools.cache
def is_built() -> bool:
    """Whether this build has the module `kddp_ext._cuda`."""
    return importlib.util.find_spec("kddp_ext._cuda") is not None


@functools.cache
def _loaded() -> Any:
    return importlib.import_module("kddp_ext._cuda")


def build_info() -> CudaBuild:
    """The CUDA part of `kddp_ext.build_info`."""
    if not is_built():
        return {"cuda": False, "cuda_architectures": [], "cuda_compiler": ""}
    native = _loaded()
    return {"cuda": True, "cuda_architectures": native.architectures.split(), "cuda_compiler": native.compiler}


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def why_not(native: Any, device: int) -> str | None:
    """The reason why the kernels cannot run on a device, in one sentence; None if they can."""
    if torch.version.hip is not None:
        return "this PyTorch was built for ROCm, and kddp_ext has no kernels for it: use backend='reference'"
    driver, runtime = native.driver_version(), native.runtime_version()
    if driver == 0:
        return "found no NVIDIA driver: install one, or move the tensors to the CPU"
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver supports CUDA {_version(driver)} and kddp_ext was built with CUDA {_version(runtime)}: "
            "update the driver, or build kddp_ext with an older CUDA"
        )
    error = native.device_error(device)
    if error in ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"this build of kddp_ext has kernels for {native.architectures} and none for compute capability "
            f"{major}.{minor}: reinstall it with -C cmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}"
        )
    return f"CUDA device {device} cannot be used: {error}" if error else None


def why_unusable(device: torch.device) -> str | None:
    """The reason why no kernel of this build can run on a CUDA device, in one sentence; None if they can.

    Only a success is remembered, because a failure may pass: a device that was in use, or memory that was short.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if index in _usable:
        return None
    reason = why_not(_loaded(), index) if is_built() else "this build has no CUDA kernels"
    if reason is None:
        _usable.add(index)
    return reason


# A constant for torch.compile, which cannot trace the module's functions. This is all that
# torch.compiler.assume_constant_result does, except that calling it would import the compiler.
why_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def module_and_place(device: int) -> tuple[Any, tuple[int, int]]:
    """The CUDA module, and the last argument of its functions: the device and its current stream.

    Raises:
        RuntimeError: the module cannot run there, with the reason.
    """
    if device not in _usable:
        reason = why_unusable(torch.device("cuda", device))
        if reason is not None:
            raise RuntimeError(f"kddp_ext: {reason}")
    return _loaded(), (device, torch._C._cuda_getCurrentRawStream(device))
