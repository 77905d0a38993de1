"""What the native operators share: the module, PyTorch's registry of operators, and how tensors are described to it."""

from __future__ import annotations

import torch  # before _core: the OpenMP runtime that torch has loaded then serves both

try:
    from kddp_ext import _core
except ImportError as error:
    raise ImportError(
        "kddp_ext: the native module _core cannot be imported. Install the package (pip install .), and start Python "
        "outside of its source folder, which has no compiled module and would be found first"
    ) from error

__all__ = ["ELEMENT_TYPES", "build_info", "core", "is_native", "library"]

core = _core
library = torch.library.Library("kddp", "DEF")

# Codes of csrc/include/kddp/types.h.
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def is_native(device: torch.device) -> bool:
    """Whether this build has kernels for tensors on `device`."""
    return device.type == "cpu"


def build_info() -> dict[str, object]:
    """What was built and what serves this process.

    Returns:
        cpu: the instruction set in use (set the environment variable KDDP_CPU_ISA before the first call to choose
        another), cuda: whether the CUDA kernels were built, compiler: what built the native module.
    """
    return {"cpu": core.instruction_set(), "cuda": False, "compiler": core.compiler}
