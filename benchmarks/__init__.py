"""What the kernels cost, side by side with what one would use instead: `python -m benchmarks`."""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def _shadows(entry: str) -> bool:
    """Whether the folder holds the package's source without its compiled module, which Python would find first."""
    package = Path(entry or os.getcwd()) / "kddp_ext"
    return package.is_dir() and not any((package / f"_core{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


sys.path[:] = [entry for entry in sys.path if not _shadows(entry)]

# torch.compile would otherwise start a pool of processes that keep the processor busy during the first timings.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# torch.profiler would otherwise write two lines at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
