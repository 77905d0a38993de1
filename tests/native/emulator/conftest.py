"""The emulator's own kernels, compiled once."""

from pathlib import Path

import pytest
from backends import ROOT, build_folder, require_emulator
from emulator import Emulator, build

KERNELS = Path(__file__).parent / "kernels"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


@pytest.fixture(scope="session")
def folder(request):
    """Keeps compiled kernels between runs."""
    require_emulator(request.config)
    return build_folder(request.config)


@pytest.fixture(scope="session")
def emulator_of_session(folder):
    include = [ROOT / "csrc", KERNELS]
    return Emulator(build(sorted(KERNELS.glob("*.cu")), folder, include=include, flags=WARNINGS, name="own_kernels"))


@pytest.fixture
def emulator(emulator_of_session):
    """The emulator with its initial settings."""
    emulator = emulator_of_session
    emulator.seed = 0
    emulator.set_devices()
    emulator.allow_everything()
    emulator.device = 0
    emulator.last_error()
    emulator.clear()
    return emulator


@pytest.fixture
def run(emulator):
    """Runs a C function; a fault of its kernel is a RuntimeError."""

    def run(name, *arguments):
        if text := emulator.run(name, *arguments):
            raise RuntimeError(text)

    return run
