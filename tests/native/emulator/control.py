"""The emulator's settings, reports and records, of a library or module that `build` made."""

import ctypes
import json
from pathlib import Path
from typing import Any


def _extent(memory: Any) -> tuple[int, int]:
    """Address and bytes of a contiguous tensor or NumPy array."""
    if hasattr(memory, "data_ptr"):
        return memory.data_ptr(), memory.numel() * memory.element_size()
    return memory.ctypes.data, memory.nbytes


class Emulator:
    """Talks to one built file; each has an emulator of its own. `library` are its C functions, for ctypes."""

    def __init__(self, path: Path | str) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_reports.restype = ctypes.c_char_p
        self.library.emulator_calls.restype = ctypes.c_char_p
        self.library.emulator_seed.restype = ctypes.c_uint64

    @property
    def seed(self) -> int:
        """What the order of lanes, warps and blocks is drawn from; at first $KDDP_EMULATOR_SEED, or 0."""
        return self.library.emulator_seed()

    @seed.setter
    def seed(self, value: int) -> None:
        self.library.emulator_set_seed(ctypes.c_uint64(value))

    def set_shuffles_order(self, order: bool) -> None:
        """Whether shuffles, votes and reductions order memory as `__syncwarp` does; CUDA does not promise it."""
        self.library.emulator_set_shuffles_order(order)

    @property
    def device(self) -> int:
        """The current device of the calling thread, as cudaGetDevice and cudaSetDevice have it."""
        return self.library.emulator_device()

    @device.setter
    def device(self, value: int) -> None:
        if self.library.emulator_set_device(value):
            raise ValueError(f"there is no device {value}")

    def last_error(self) -> int:
        """What cudaGetLastError() gives; it is forgotten with that."""
        return self.library.emulator_last_error()

    def set_devices(self, count: int = 2, multiprocessors: int = 4) -> None:
        """How many devices there are, and how many multiprocessors each has."""
        self.library.emulator_set_devices(count, multiprocessors)

    def allow(self, memory: Any, *, writable: bool, name: str = "", offset: int = 0, size: int | None = None) -> None:
        """Lets kernels use a tensor or array, or `size` bytes of it from byte `offset` on.

        Once anything is allowed, everything else is out of bounds, until `allow_everything`.
        """
        address, total = _extent(memory)
        length = ctypes.c_size_t(total - offset if size is None else size)
        self.library.emulator_allow(ctypes.c_void_p(address + offset), length, writable, name.encode())

    def allow_everything(self) -> None:
        """Takes back what was allowed."""
        self.library.emulator_allow_everything()

    def needs(self, memory: Any, *, is_store: bool, checked: bool = True) -> None:
        """Declares what the next launch has to read or write: every byte, or the launch fails, where `checked`."""
        address, total = _extent(memory)
        self.library.emulator_needs(ctypes.c_void_p(address), ctypes.c_size_t(total), is_store, checked)

    def reports(self) -> list[dict[str, Any]]:
        """What each launch since `clear` did, as `emulator::Report` has it."""
        return json.loads(self.library.emulator_reports())

    def calls(self) -> list[dict[str, Any]]:
        """Launches and calls of the runtime since `clear`, in order, as `emulator::Call` has it."""
        return json.loads(self.library.emulator_calls())

    def clear(self) -> None:
        """Forgets reports and calls."""
        self.library.emulator_clear()
