"""Runs one comparison in a process of its own, so that it finds the memory and the compiler's caches as it should.

With glibc's defaults, a tensor above 32 MiB (at first even one above 128 KiB) is given back to the system when it is
freed, and the next one is faulted in anew, page by page. That costs more than the arithmetic, and whoever allocates
more pays more. It is what a training loop sees unless its allocator is set otherwise, but it says little about the
kernels; so the same is measured with a warm heap, where freed memory is kept and used again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparisons import COMPARISONS
from benchmarks.settings import Settings
from kddp_ext.files import write_json

# glibc reads these when a process starts (man mallopt); other C libraries ignore them.
HEAPS = {
    "default": {},
    "warm": {
        "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    },
}


def run(comparison: str, heap: str, settings: Settings) -> dict[str, Any]:
    """The comparison's result.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on the standard error stream.
    """
    environment = {k: v for k, v in os.environ.items() if k not in HEAPS["warm"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        arguments = [comparison, json.dumps(settings._asdict()), str(path)]
        command = [sys.executable, "-m", "benchmarks.child", *arguments]
        subprocess.run(command, env={**environment, **HEAPS[heap]}, check=True)
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def main() -> None:
    comparison, settings_text, path = sys.argv[1:]
    settings = Settings(**json.loads(settings_text))
    torch.set_num_threads(settings.threads)
    write_json(path, COMPARISONS[comparison].measure(settings))


if __name__ == "__main__":
    main()
