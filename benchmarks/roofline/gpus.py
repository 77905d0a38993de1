"""Published figures of a few GPUs."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Peak figures from the vendor's data sheet.

    Attributes:
        bandwidth: memory bandwidth in bytes per second.
        multiprocessors: enabled in this product.
        clock: boost clock in Hz, which gives the data sheet's float32 rate.
        source: the document of the figures.
    """

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    source: str

    @property
    def exponentials(self) -> float:
        """Peak rate of 2^x in float32, per second."""
        return EXPONENTIALS_PER_CLOCK * self.multiprocessors * self.clock

    @property
    def instructions(self) -> float:
        """Peak rate of instructions of threads, per second."""
        return INSTRUCTIONS_PER_CLOCK * self.multiprocessors * self.clock


# Per multiprocessor of compute capability 8.0 to 9.0: CUDA C++ Programming Guide, throughput of native arithmetic
# instructions (reciprocal, base-2 logarithm, base-2 exponential, sine and cosine in float32).
EXPONENTIALS_PER_CLOCK = 16
# Four schedulers, each of which issues one instruction of a warp of 32 threads.
INSTRUCTIONS_PER_CLOCK = 128

# The data sheets of the H100 and the H200 give no clock: 67 TFLOPS of float32 are 2 operations per clock of 128 cores
# of 132 multiprocessors at 1.98 GHz.
GPUS = {
    "H100": Gpu("H100 SXM", 3.35e12, 132, 1.98e9, "NVIDIA H100 Tensor Core GPU data sheet"),
    "A100": Gpu("A100 80GB SXM", 2.039e12, 108, 1.41e9, "NVIDIA A100 Tensor Core GPU data sheet"),
    "H200": Gpu("H200 SXM", 4.8e12, 132, 1.98e9, "NVIDIA H200 Tensor Core GPU data sheet"),
    "L4": Gpu("L4", 0.3e12, 58, 2.04e9, "NVIDIA L4 Tensor Core GPU data sheet"),
}
