"""A model of what the loss and the compaction cost on GPUs. Nothing is measured, and no GPU is needed.

`python -m benchmarks.roofline` runs the CUDA kernels on the tests' emulator, counts the bytes that they move, and
divides them by published peak figures.
"""
