"""What serves the loss and the compaction in a test: the CPU's kernels, the GPU's on the emulator, or a GPU."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulator.build import build, compiler
from emulator.control import Emulator

from kddp_ext.ops import library

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "python_bindings" / "cuda.cpp"]
DEFINITIONS = {
    "KDDP_CUDA_MODULE": "_emulated",
    "KDDP_CUDA_COMPILER": '"the emulator"',
    "KDDP_CUDA_ARCHITECTURES": '"emulated"',
}


class Emulated:
    """The module `_emulated`, made of the CUDA sources, and its emulator."""

    def __init__(self, folder: Path, *, sanitize: bool = False) -> None:
        flags = [*(f"-D{name}={value}" for name, value in DEFINITIONS.items())]
        include = [ROOT / "csrc", ROOT / "csrc" / "include", ROOT / "python_bindings"]
        settings = {"include": include, "flags": flags, "sanitize": sanitize}
        path = build(SOURCES, folder, kind="module", name="_emulated", **settings)
        spec = importlib.util.spec_from_file_location("_emulated", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.emulator = Emulator(path)
        self.counters = torch.zeros(self.module.counters_bytes, dtype=torch.uint8)

    def place(self, device: int = 0, stream: int = 0) -> tuple[int, int, int, torch.Tensor]:
        """Where a call of the module runs."""
        return device, stream, self.counters.data_ptr(), self.counters

    @contextlib.contextmanager
    def serves(self) -> Iterator[None]:
        """Tensors on the CPU go to the emulated kernels meanwhile; each launch has to leave its counters at 0."""
        try:
            with library.stand_in(self.module, self.place()):
                yield
            assert not self.counters.any(), "a launch has left counters that are not 0"
        finally:
            self.counters.zero_()


def has_gpu() -> bool:
    """Whether tests can run on a GPU."""
    return torch.cuda.is_available()


FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros",
)  # fmt: skip


@contextlib.contextmanager
def tensors_on(device: str) -> Iterator[None]:
    """Tensors are made on a device, of the numbers that they would have on the CPU, unless one is named.

    The functions are replaced, for a mode of PyTorch's would get in the way of the compiler and of opcheck.
    """

    def on_device(make):
        @functools.wraps(make)
        def made_on_device(*args, **kwargs):
            made = make(*args, **kwargs)
            if kwargs.get("device") is not None:
                return made
            return made.detach().to(device).requires_grad_(made.requires_grad)

        return made_on_device

    with pytest.MonkeyPatch.context() as patch:
        for name in FACTORIES:
            patch.setattr(torch, name, on_device(getattr(torch, name)))
        yield


_emulated: list[Emulated] = []


def emulated(config: pytest.Config) -> Emulated:
    """The emulated module; the first call of a session compiles it, where it has changed."""
    if shutil.which(compiler()) is None:
        pytest.skip("no C++ compiler: the emulated kernels cannot be built")
    if not _emulated:
        _emulated.append(Emulated(build_folder(config), sanitize=config.getoption("sanitized")))
    return _emulated[0]


def build_folder(config: pytest.Config) -> Path:
    """Where what is compiled is kept between runs, or, where pytest keeps nothing, between tests."""
    cache = getattr(config, "cache", None)
    return cache.mkdir("emulator") if cache else _scratch()


@functools.cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="kddp-emulator-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
