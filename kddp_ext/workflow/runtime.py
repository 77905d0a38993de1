"""Where and in which precision a run computes, and a clock that does not disturb it."""

from __future__ import annotations

import ctypes
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from kddp_ext.workflow.config import Device, Precision
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.processes import Processes

Model = TypeVar("Model", bound=nn.Module)


class Runtime:
    """The device of a run, its autocast, and the processes that share its work.

    Args:
        device: "auto" takes a CUDA device where there is one; of several processes on a machine each its own.
        precision: "auto" takes bfloat16 where the device computes in it natively: elsewhere it is emulated,
            and slower than float32.
        processes: those of the run; by default this one alone.

    Raises:
        WorkflowError: there is no such device.
    """

    def __init__(
        self, device: Device = "cpu", precision: Precision = "auto", processes: Processes | None = None
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise WorkflowError("--device cuda: this PyTorch sees no CUDA device")
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.processes = Processes() if processes is None else processes
        self.device = torch.device(kind)
        if kind == "cuda" and self.processes.count > 1:
            self.device = _gpu_of(self.processes)
        native = precision == "auto" and _computes_bfloat16(self.device)
        self.dtype = torch.bfloat16 if native or precision == "bfloat16" else torch.float32

    def __str__(self) -> str:
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"
        if self.processes.count > 1:
            where += f", {self.processes.count} processes"
        threads = torch.get_num_threads()
        if self.device.type == "cuda":
            return where
        return f"{where}, {threads} thread{'' if threads == 1 else 's'}"

    def place(self, model: Model) -> Model:
        """Move `model` to the device, its convolutions channels last."""
        model.to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        return model

    def autocast(self) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _gpu_of(processes: Processes) -> torch.device:
    if processes.local_rank >= torch.cuda.device_count():
        raise WorkflowError(
            f"--device: expected a GPU for each process of this machine, but there are {torch.cuda.device_count()} and "
            f"this is process {processes.local_rank + 1}; start fewer (--nproc-per-node), or use --device cpu"
        )
    torch.cuda.set_device(processes.local_rank)  # what is allocated without a name goes there too
    return torch.device("cuda", processes.local_rank)


def prepare_process() -> None:
    """What every process that trains asks of its machine. Comes before anything is computed."""
    tune_malloc()
    flush_denormals()


def tune_malloc() -> None:
    """Have the C library keep freed memory instead of handing it back to the system.

    Each step frees and allocates the same large tensors again. By default glibc maps them anew every time,
    and the system clears every page: a third of a training step on a CPU. Without glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the options' numbers in malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 64 * 2**20)


def flush_denormals() -> None:
    """Have this process compute with 0 where a number would be denormal, below 1e-38 in float32.

    Adam's momentum of a silent neuron's weights gets there within a thousand steps, and a processor takes tens
    of times as long for such numbers: a quarter of a student's step where most of a wide layer is silent. Threads
    take the mode over from the one that starts them, so this comes before anything is computed.
    """
    torch.set_flush_denormal(True)


class PhaseClock:
    """Sums the seconds that each phase of an epoch takes.

    On CUDA the work is only queued when a phase ends, so events are recorded, and read once, in `seconds`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside as part of `name`."""
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
        """Seconds of each phase so far; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        return {name: round(seconds, 4) for name, seconds in self._seconds.items()}


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
