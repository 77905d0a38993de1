"""What the kernels cost, side by side with what one would use instead: `python -m benchmarks`."""

import os
import sys

# Started in the source folder, Python would find its kddp_ext first, which has no compiled module.
sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]

# torch.compile would otherwise start a pool of processes that keep the processor busy during the first timings.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
