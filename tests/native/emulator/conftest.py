"""The emulator's own kernels, compiled once."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from backends import build_folder
from emulator.arrays import pointer
from emulator.build import build
from emulator.control import Emulator

KERNELS = Path(__file__).parent / "kernels"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


@pytest.fixture(scope="session")
def folder(request):
    """Where what is compiled is kept between runs."""
    return build_folder(request.config)


@pytest.fixture(scope="session")
def emulator_of_session(folder):
    return Emulator(build(sorted(KERNELS.glob("*.cu")), folder, flags=WARNINGS, name="own_kernels"))


@pytest.fixture
def emulator(emulator_of_session):
    """The emulator with its first settings."""
    emulator = emulator_of_session
    emulator.seed = 0
    emulator.set_devices()
    emulator.set_shuffles_order(True)
    emulator.allow_everything()
    emulator.device = 0
    emulator.last_error()
    emulator.clear()
    return emulator


@pytest.fixture
def run(emulator):
    """Runs a C function with arrays and numbers; an error that a kernel makes is a RuntimeError."""

    def run(name, *arguments):
        function = emulator.library[name]
        function.restype = ctypes.c_char_p
        text = function(*(pointer(a) if isinstance(a, np.ndarray) else a for a in arguments))
        if text:
            raise RuntimeError(text.decode())

    return run
