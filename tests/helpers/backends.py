"""The kernels that a test runs on: the CPU's, the GPU's on the emulator, or a GPU."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulator import BuildError, Emulator, Source, build, compiler

from kddp_ext.ops import library

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
# As in cmake/cuda.cmake.
LOGITS_TYPES = ("float32", "bfloat16", "float16", "float64")
SOURCES: list[Source] = [
    *(CUDA / f"{name}.cu" for name in ("kd_l1_loss", "scale", "gather", "gradient_products", "occupancy")),
    *((CUDA / "loss_kernels.cu", [f"-DKDDP_LOGITS={dtype}"]) for dtype in LOGITS_TYPES),
    ROOT / "python_bindings" / "cuda.cpp",
]
DEFINITIONS = {
    "KDDP_CUDA_MODULE": "_emulated",
    "KDDP_CUDA_COMPILER": '"the emulator"',
    "KDDP_CUDA_ARCHITECTURES": '"emulated"',
}


class Emulated:
    """The module `_emulated`, compiled from the CUDA sources, and its emulator."""

    def __init__(self, folder: Path, *, sanitize: bool = False) -> None:
        flags = [f"-D{name}={value}" for name, value in DEFINITIONS.items()]
        include = [ROOT / "csrc", ROOT / "csrc" / "include", ROOT / "python_bindings"]
        path = build(SOURCES, folder, kind="module", name="_emulated", include=include, flags=flags, sanitize=sanitize)
        spec = importlib.util.spec_from_file_location("_emulated", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.emulator = Emulator(path)

    def place(self, device: int = 0, stream: int = 0) -> tuple[int, int]:
        """The last argument of the module's functions: where a call runs."""
        return device, stream

    @contextlib.contextmanager
    def serves(self) -> Iterator[None]:
        """Runs calls for CPU tensors on the emulated kernels."""
        with library.stand_in(self.module, self.place()):
            yield


def has_gpu() -> bool:
    """Whether tests can run on a GPU."""
    return torch.cuda.is_available()


FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros",
)  # fmt: skip


@contextlib.contextmanager
def tensors_on(device: str) -> Iterator[None]:
    """Creates tensors on `device` unless a call names another, with the same values as on the CPU.

    Replaces PyTorch's factory functions: a torch function mode would interfere with torch.compile and opcheck.
    """

    def on_device(make):
        @functools.wraps(make)
        def make_on_device(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if kwargs.get("device") is not None:
                return tensor
            return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        return make_on_device

    with pytest.MonkeyPatch.context() as patch:
        for name in FACTORIES:
            patch.setattr(torch, name, on_device(getattr(torch, name)))
        yield


_emulated: list[Emulated] = []


def emulated(config: pytest.Config) -> Emulated:
    """The emulated module. The first call of a session compiles it if it has changed; skips without a compiler."""
    require_emulator(config)
    if not _emulated:
        _emulated.append(Emulated(build_folder(config), sanitize=config.getoption("sanitized")))
    return _emulated[0]


def require_emulator(config: pytest.Config) -> None:
    """Skips a test if the emulator is not wanted, or cannot be compiled."""
    if config.getoption("emulated") == "none":
        pytest.skip("--emulated=none")
    try:
        compiler()
    except BuildError as reason:
        pytest.skip(str(reason))


def build_folder(config: pytest.Config) -> Path:
    """Where compiled kernels are kept between runs, or between tests if pytest has no cache."""
    cache = getattr(config, "cache", None)
    return cache.mkdir("emulator") if cache else _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="kddp-emulator-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
