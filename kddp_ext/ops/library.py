"""What the native operators share: the modules, PyTorch's registry of operators, how tensors are described to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch  # before _core: the OpenMP runtime that torch has loaded then serves both
from torch import Tensor

try:
    from kddp_ext import _core
except ImportError as error:
    raise ImportError(
        "kddp_ext: the native module _core cannot be imported. Install the package (pip install .), and start Python "
        "outside of its source folder, which has no compiled module and would be found first"
    ) from error

from kddp_ext.ops import cuda

__all__ = ["ELEMENT_TYPES", "build_info", "core", "is_native", "library", "native", "scales_natively", "workspace_on"]

core = _core
library = torch.library.Library("kddp", "DEF")

# Codes of csrc/include/kddp/types.h.
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Set by `stand_in`.
_stand_in: tuple[Any, Any] | None = None


def native(tensor: Tensor) -> tuple[Any, Any]:
    """The module whose kernels serve `tensor`, and its last argument: how many threads, or where on a GPU.

    Raises:
        RuntimeError: CUDA cannot be used, with the reason.
    """
    if tensor.is_cuda:
        return cuda.module(tensor.device), cuda.place(tensor.device)
    return _stand_in or (core, torch.get_num_threads())


@contextmanager
def stand_in(module: Any, place: Any) -> Iterator[None]:
    """Tensors on the CPU go to the kernels of `module` meanwhile, an emulated GPU's, which are told `place`."""
    global _stand_in
    _stand_in = (module, place)
    try:
        yield
    finally:
        _stand_in = None


def scales_natively(device: torch.device) -> bool:
    """Whether gradients on `device` are scaled by a kernel; on the CPU PyTorch does that as well."""
    return (device.type == "cuda" and cuda.is_built()) or _stand_in is not None


def workspace_on(device: torch.device) -> Callable[[int], Tensor]:
    """What the native modules get their workspace from."""
    return lambda size: torch.empty(size, dtype=torch.uint8, device=device)


def is_native(device: torch.device) -> bool:
    """Whether this build has kernels for tensors on `device`. On ROCm, "cuda" is another device by that name."""
    return device.type == "cpu" or (device.type == "cuda" and cuda.is_built())


class BuildInfo(cuda.CudaBuild):
    """What `build_info` returns, which says more of it."""

    cpu: str
    compiler: str


def build_info() -> BuildInfo:
    """What was built and what serves this process.

    Returns:
        As "cpu" the instruction set in use (set the environment variable KDDP_CPU_ISA before the first call to choose
        another), as "cuda" whether the CUDA kernels were built, as "cuda_architectures" for which (as CMake names them;
        empty without), as "cuda_compiler" by what ("" without), as "compiler" what built the native module of the CPU.
    """
    return {"cpu": core.instruction_set(), **cuda.build_info(), "compiler": core.compiler}
