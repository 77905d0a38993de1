"""What a comparison asks of the device that it runs on. Tests give it the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import kddp_ext
from benchmarks.cases import Inputs
from benchmarks.gpu.clocks import Clock, EventClock, Step, WallClock
from kddp_ext.ops import cuda

CAPTURE_WARM_UP = 3  # steps before a capture, as PyTorch's notes on CUDA graphs have it


class Device(NamedTuple):
    """A device.

    Attributes:
        name: as torch.device takes it.
        cold: times a call by itself, with cold caches.
        repeated: times calls one after the other.
        peak_bytes: the most that a step has allocated at a time, given the inputs whose gradients it makes.
        capture: gives a step that replays a captured one; None where there is no such thing.
    """

    name: str
    cold: Clock
    repeated: Clock
    peak_bytes: Callable[[Step, Inputs], int]
    capture: Callable[[Step], Step] | None


def why_not() -> str | None:
    """One sentence on why nothing can be measured on a GPU here, or None."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no CUDA device: --device cuda needs an NVIDIA GPU and a build for it."
    if not kddp_ext.build_info()["cuda"]:
        return "This build of kddp_ext has no CUDA kernels, which --device cuda measures."
    try:
        cuda.module(torch.device("cuda"))
    except RuntimeError as error:
        return str(error)
    return None


def gpu() -> Device:
    """The current CUDA device."""
    return Device("cuda", EventClock(), WallClock(torch.cuda.synchronize), peak_bytes, captured)


def peak_bytes(step: Step, inputs: Inputs) -> int:
    """By PyTorch's allocator, beyond what was allocated before."""
    for leaf in inputs.leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(step: Step) -> Step:
    """Replays the kernels of one call, which is captured as a CUDA graph.

    Raises:
        RuntimeError: the step does what cannot be captured, such as looking at a result.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    replay: Step = graph.replay
    return replay
