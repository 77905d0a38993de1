"""What all operators share: the native modules, PyTorch's operator registry, and descriptions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch  # before _core, so that both use the OpenMP runtime that torch loads
from torch import Tensor

try:
    from kddp_ext import _core
except ImportError as error:
    raise ImportError(
        "kddp_ext: cannot import the native module _core. Install the package (pip install .), and start Python "
        "outside its source folder: that folder has no compiled module, and Python finds it first"
    ) from error

from kddp_ext.ops import cuda

library = torch.library.Library("kddp", "DEF")

# The codes of csrc/include/kddp/types.h.
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_stand_in: tuple[Any, Any] | None = None  # set by `stand_in`


def register(name: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register what computes an operator, and what makes its outputs for fake tensors; returns the operator.

    Looking an operator up by its name at each call would take longer than the loss of a small batch.
    """
    for device in ("CPU", "CUDA"):
        library.impl(name, compute, device)
    torch.library.register_fake(f"kddp::{name}", fake, lib=library)
    return getattr(torch.ops.kddp, name).default


def native(tensor: Tensor) -> tuple[Any, Any]:
    """The module with the kernels for `tensor`, and their last argument: the number of threads, or the CUDA launch.

    Raises:
        RuntimeError: CUDA cannot be used, with the reason.
    """
    if tensor.is_cuda:
        return cuda.module_and_place(tensor.get_device())
    return _stand_in or (_core, torch.get_num_threads())


@contextmanager
def stand_in(module: Any, place: Any) -> Iterator[None]:
    """Let the kernels of `module`, an emulated GPU, serve CPU tensors here. `place` is their last argument."""
    global _stand_in
    _stand_in = (module, place)
    try:
        yield
    finally:
        _stand_in = None


def scales_natively(device: torch.device) -> bool:
    """Whether a kernel scales gradients on `device`. On the CPU PyTorch does it equally well."""
    return (device.type == "cuda" and is_native(device)) or _stand_in is not None


def overwrites_logits(tensor: Tensor) -> bool:
    """Whether the kernels for `tensor` may write a gradient in place of its logits. GPUs cache what they read."""
    return tensor.is_cpu and _stand_in is None


def workspace_on(device: torch.device) -> Callable[[int], Tensor]:
    """The allocator that native modules call for their workspace, with a number of bytes."""
    return lambda size: torch.empty(size, dtype=torch.uint8, device=device)


def is_native(device: torch.device) -> bool:
    """Whether kernels of this build can run on `device`."""
    return device.type == "cpu" or (device.type == "cuda" and cuda.why_unusable(device) is None)


def needs_no_dispatcher(tensors: Iterable[Tensor | None]) -> bool:
    """True for plain CPU and CUDA tensors in eager mode, if no compiler, mode, transform or profiler sees the operator.

    PyTorch's dispatcher takes 10 µs, which is 15 to 25% of the loss of a small batch (128 × 10 logits, 128 × 1024
    activations).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._is_torch_function_mode_enabled() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._autograd._profiler_enabled() or torch._C._get_tracing_state() is not None:
        return False
    return all(map(_is_plain, tensors))


def _is_plain(tensor: Tensor | None) -> bool:
    # The dispatcher resolves tensors whose memory holds the negative of their values, such as conj().imag.
    return tensor is None or (
        type(tensor) in _PLAIN_TYPES and (tensor.is_cpu or tensor.is_cuda) and not tensor.is_neg()
    )


def why_not_native(device: torch.device) -> str:
    """Why `is_native` is false, and what helps, if anything does."""
    if device.type != "cuda":
        return f"this build of kddp_ext has no native kernels for {device.type!r} tensors"
    if cuda.is_built():
        return f"the CUDA kernels of kddp_ext cannot run: {cuda.why_unusable(device)}"
    return (
        "this build of kddp_ext has no native kernels for 'cuda' tensors; to build CUDA kernels: "
        "pip install . -C cmake.define.KDDP_CUDA=ON"
    )


def storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    """A key that is equal for tensors in the same storage, and different otherwise while both tensors are alive."""
    return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)


def sliced_shape(tensor: Tensor, rows: int, columns: int, kept_rows: int, kept_columns: int) -> tuple[int, ...]:
    """Shape of `tensor`, seen as (rows, columns, inner), after a selection of rows and columns.

    Behind a flatten each column is a block of the tensor's second dimension, so that dimension shrinks in proportion.
    """
    if tensor.dim() <= 1:
        return (tensor.numel() // (rows * columns) * kept_rows * kept_columns,)
    return (kept_rows, tensor.shape[1] // columns * kept_columns, *tensor.shape[2:])


class BuildInfo(cuda.CudaBuild):
    """The result of `build_info`, which documents the keys."""

    cpu: str
    compiler: str


def build_info() -> BuildInfo:
    """What was built, and which kernels this process uses.

    Returns:
        A dictionary. "cpu" is the instruction set in use; set the environment variable KDDP_CPU_ISA before the first
        call to choose another. "compiler" is the compiler of the CPU module. "cuda" says whether CUDA kernels were
        built, "cuda_architectures" for which architectures (CMake's names; empty without CUDA), and "cuda_compiler" by
        which compiler ("" without CUDA). To build CUDA kernels on a machine without a GPU:
        `pip install . -C cmake.define.KDDP_CUDA=ON`.
    """
    return {"cpu": _core.instruction_set(), **cuda.build_info(), "compiler": _core.compiler}
