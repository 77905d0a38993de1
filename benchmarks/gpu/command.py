"""Runs `python -m benchmarks --device cuda`."""

from __future__ import annotations

import argparse
import platform
from datetime import datetime, timezone
from typing import Any

import torch
from rich.console import Console

import kddp_ext
from benchmarks.gpu import compaction, loss
from benchmarks.gpu.device import Device
from benchmarks.machine import version_of
from benchmarks.settings import Settings
from benchmarks.table import write_markdown
from kddp_ext.files import write_json

JSON_VERSION = 1
COMPARISONS = {"loss": loss, "compaction": compaction}


def run(arguments: argparse.Namespace, settings: Settings, device: Device, described: dict[str, Any]) -> int:
    """Measures, prints and writes what the command line asks for."""
    console = Console()
    head = summary(described)
    console.print(head)
    results, tables = {}, []
    for name in arguments.only:
        with console.status(f"measuring {name}"):
            results[name] = COMPARISONS[name].measure(settings, device)
        tables += COMPARISONS[name].tables(results[name])
    for table in tables:
        console.print(table.for_terminal())
    if arguments.json:
        content = {"version": JSON_VERSION, "machine": described, "settings": settings._asdict(), "gpu": results}
        write_json(arguments.json, content)
    if arguments.markdown:
        write_markdown(arguments.markdown, head, tables, head_name="gpu")
    return 0


def describe() -> dict[str, Any]:
    """Describes the current GPU, the software and the date."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    build = kddp_ext.build_info()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "kddp_ext": kddp_ext.__version__,
        "cuda_compiler": build["cuda_compiler"],
        "cuda_architectures": build["cuda_architectures"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "liger_kernel": version_of("liger-kernel"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def summary(machine: dict[str, Any]) -> str:
    """One line above the tables."""
    return (
        f"{machine['gpu']} ({machine['multiprocessors']} multiprocessors, {machine['memory_bytes'] / 2**30:.0f} GiB), "
        f"kernels for {' '.join(machine['cuda_architectures'])} ({machine['cuda_compiler']}), "
        f"torch {machine['torch']}, CUDA {machine['cuda']}, Liger Kernel {machine['liger_kernel'] or 'not installed'}, "
        f"Python {machine['python']}, {machine['system']}, {machine['date'][:10]}"
    )
