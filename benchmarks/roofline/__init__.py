"""What the loss and the compaction would cost on GPUs at the least, modelled and not measured.

`python -m benchmarks.roofline` runs the CUDA kernels on the tests' emulator, counts what they move, and divides it by
published peak figures. No GPU takes part.
"""
