"""Where a run computes and in which precision, and the seconds that its phases take."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from kddp_ext.workflow import distributed
from kddp_ext.workflow.config import Device, Precision
from kddp_ext.workflow.errors import WorkflowError

Model = TypeVar("Model", bound=nn.Module)


class Runtime:
    """The device and the precision of a run.

    "auto" is a CUDA device if there is one, and bfloat16 where the device supports it natively; emulated, it is slower
    than float32. Each process of a machine takes its own GPU. Raises WorkflowError if there is none.
    """

    def __init__(self, device: Device = "cpu", precision: Precision = "auto") -> None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device == "cuda" and not gpus:
            raise WorkflowError("--device cuda: PyTorch finds no CUDA device")
        self.device = torch.device("cuda" if device == "cuda" or (device == "auto" and gpus) else "cpu")
        if self.device.type == "cuda" and distributed.count() > 1:
            local_rank = int(os.environ["LOCAL_RANK"])
            if local_rank >= gpus:
                raise WorkflowError(
                    f"--device: expected a GPU for each process of this machine, got {gpus} and process "
                    f"{local_rank + 1}; start fewer processes (--nproc-per-node), or use --device cpu"
                )
            torch.cuda.set_device(local_rank)  # also for allocations without an index
            self.device = torch.device("cuda", local_rank)
        bfloat16 = precision == "bfloat16" or (precision == "auto" and _has_bfloat16(self.device))
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32

    def __str__(self) -> str:
        text, threads = f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}", torch.get_num_threads()
        if distributed.count() > 1:
            text += f", {distributed.count()} processes"
        return text + (f", {threads} thread{'s' * (threads != 1)}" if self.device.type == "cpu" else "")

    def place(self, model: Model) -> Model:
        """Move `model` to the device, with its convolutions in channels-last layout."""
        model.to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        return model

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def prepare_process() -> None:
    """Set up malloc and the floating-point mode for training. Call it before PyTorch starts any threads."""
    if platform.libc_ver()[0] == "glibc":
        # Each step frees and allocates the same large tensors. By default glibc returns them to the system, which
        # clears every page when it maps them again: a third of a training step on a CPU. So it keeps freed memory.
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
    # Adam's momentum of inactive neurons becomes denormal (below 1e-38 in float32) within a thousand steps. Processors
    # are tens of times slower with such numbers: a quarter of a step in a wide layer that is mostly inactive. Threads
    # inherit the mode from the thread that starts them.
    torch.set_flush_denormal(True)


class PhaseClock:
    """Sums the seconds of each phase of an epoch. On CUDA it records events, so that it never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """The seconds of each phase so far. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        return {name: round(seconds, 4) for name, seconds in self._seconds.items()}
