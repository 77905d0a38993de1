"""Arrays for kernels: what the emulator's tests pass to C functions."""

import ctypes

import numpy as np


def pointer(array):
    """A NumPy array's memory, as an argument of a C function."""
    return ctypes.c_void_p(array.ctypes.data)


def aligned(count, dtype=np.float32, *, offset=0):
    """An array of zeros whose first element lies `offset` elements behind a multiple of 256 bytes."""
    size = np.dtype(dtype).itemsize
    memory = np.zeros(count * size + 512, np.uint8)
    start = -memory.ctypes.data % 256 + offset * size
    return memory[start : start + count * size].view(dtype)
