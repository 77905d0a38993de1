"""Runs one comparison in its own process, so that each starts with the same heap and compiler caches.

By default, glibc returns a freed tensor above 32 MiB (at first even above 128 KiB) to the system, and the next one is
faulted in page by page. That takes longer than the arithmetic, and an implementation that allocates more pays more. A
training loop sees this unless its allocator is configured otherwise, but it says little about the kernels. So some
comparisons run a second time with a warm heap, which keeps and reuses freed memory.
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

# glibc reads these variables when a process starts (man mallopt); other C libraries ignore them.
HEAPS = {
    "default": {},
    "warm": {
        "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    },
}


def run(comparison: str, heap: str, settings: Settings) -> dict[str, Any]:
    """Run a comparison in a new process and return its result.

    Raises:
        subprocess.CalledProcessError: it failed; its message is on stderr.
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
