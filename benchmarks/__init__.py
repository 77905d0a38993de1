"""Speed of the kernels compared with the alternatives: `python -m benchmarks`."""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def _shadows(entry: str) -> bool:
    """Whether the folder has the package's source without its compiled module, so that importing it would fail."""
    package = Path(entry or os.getcwd()) / "kddp_ext"
    return package.is_dir() and not any((package / f"_core{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


sys.path[:] = [entry for entry in sys.path if not _shadows(entry)]

# Otherwise torch.compile starts processes that keep the processor busy during the first timings.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Otherwise torch.profiler prints two lines at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
