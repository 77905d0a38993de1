"""The host's side: devices, streams and errors of launches are CUDA's, and everything is recorded."""

import ctypes

import numpy as np
import pytest

INVALID_VALUE, INVALID_CONFIGURATION, INVALID_HANDLE, TOO_LARGE = 1, 9, 400, 720


def launch(emulator, grid=(1, 1, 1), block=32, shared=0, stream=0):
    return emulator.library.launch_nothing(*grid, block, ctypes.c_size_t(shared), ctypes.c_void_p(stream))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, 0),
        ({"block": 1024}, 0),
        ({"block": 1025}, INVALID_CONFIGURATION),
        ({"block": 0}, INVALID_CONFIGURATION),
        ({"grid": (0, 1, 1)}, INVALID_CONFIGURATION),
        ({"grid": (1, 65536, 1)}, INVALID_CONFIGURATION),
        ({"grid": (1, 1, 65536)}, INVALID_CONFIGURATION),
        ({"grid": (1, 3, 2)}, 0),
        ({"shared": 49152}, 0),
        ({"shared": 49153}, INVALID_VALUE),
    ],
)
def test_limits_of_a_launch(emulator, settings, error):
    emulator.library.raise_shared_limit(0)
    assert launch(emulator, **settings) == error
    assert emulator.last_error() == 0  # the kernel's host has asked for it, and asking forgets it
    assert len(emulator.reports()) == (error == 0)
    assert [call["error"] for call in emulator.calls() if call["name"] == "launch"] == [error]


def test_the_limit_of_shared_memory_can_be_raised(emulator):
    assert emulator.library.raise_shared_limit(227 * 1024 + 1) == INVALID_VALUE
    assert emulator.last_error() == INVALID_VALUE
    assert emulator.library.raise_shared_limit(100_000) == 0
    assert launch(emulator, shared=100_000) == 0
    assert launch(emulator, shared=100_001) == INVALID_VALUE


def test_a_cooperative_launch_has_to_fit(emulator):
    emulator.set_devices(2, 3)
    assert emulator.library.occupancy(1024, ctypes.c_size_t(0)) == 1
    assert emulator.library.occupancy(256, ctypes.c_size_t(40 << 10)) == 4
    assert emulator.library.occupancy(32, ctypes.c_size_t(0)) == 32
    assert emulator.library.launch_nothing_together(3, 1024) == 0
    assert emulator.library.launch_nothing_together(4, 1024) == TOO_LARGE


def test_a_launch_takes_its_device_and_stream(emulator):
    """What a test of a binding looks at: where launches went, and that the caller's device is as it was."""
    emulator.device = 1
    emulator.clear()
    assert emulator.library.launch_guarded(0, ctypes.c_void_p(0xABC0)) == 0
    assert emulator.device == 1
    assert [(c["name"], c["device"], c["stream"]) for c in emulator.calls()] == [
        ("cudaSetDevice", 0, 0),
        ("launch", 0, 0xABC0),
        ("cudaSetDevice", 1, 0),
    ]
    call = emulator.calls()[1]
    assert (call["kernel"], call["grid"], call["block"], call["shared"]) == ("nothing", [1, 1, 1], [32, 1, 1], 0)
    assert emulator.library.launch_guarded(2, None) == 101  # no such device
    assert emulator.calls()[-3]["error"] == 101


def test_a_stream_belongs_to_a_device(emulator):
    emulator.device = 1
    emulator.library.make_stream.restype = ctypes.c_void_p
    stream = emulator.library.make_stream()
    assert launch(emulator, stream=stream) == 0
    emulator.device = 0
    assert launch(emulator, stream=stream) == INVALID_HANDLE


def test_what_synchronizes_or_allocates_is_recorded(emulator):
    emulator.library.allocate_and_synchronize()
    assert [c["name"] for c in emulator.calls()] == ["cudaMalloc", "cudaMemset", "cudaDeviceSynchronize", "cudaFree"]


@pytest.mark.parametrize("together", [0, 1])
def test_arguments_in_an_array_of_pointers(emulator, together):
    out = np.zeros(32, np.int32)
    assert emulator.library.launch_packed(ctypes.c_void_p(out.ctypes.data), 7, together) == 0
    assert (out == 7).all()
    assert emulator.reports()[0]["cooperative"] == bool(together)
