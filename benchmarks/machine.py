"""Describes the machine of a measurement."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kddp_ext
from benchmarks.settings import Settings


def describe(settings: Settings) -> dict[str, Any]:
    """Processor, software, threads, date and load."""
    build = kddp_ext.build_info()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "instruction_set": build["cpu"],
        "kddp_ext": kddp_ext.__version__,
        "compiler": build["compiler"],
        "torch": torch.__version__,
        "torch_pruning": version_of("torch-pruning"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()) or 'unknown C library'}",
        "transparent_huge_pages": _huge_pages(),
        "load_average": os.getloadavg()[0],  # of the last minute
    }


def summary(machine: dict[str, Any]) -> str:
    """One line for the head of the tables."""
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['instruction_set']} kernels "
        f"({machine['compiler']}), torch {machine['torch']}, Python {machine['python']}, {machine['system']}, "
        f"huge pages {machine['transparent_huge_pages']}, {machine['date'][:10]}"
    )


def _cpu_model() -> str:
    """The processor's name with its family and model, because the name alone is often vague on virtual machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _huge_pages() -> str:
    """Linux's setting for transparent huge pages: always, madvise, never, or unknown."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else ""
    return chosen or "unknown"


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
