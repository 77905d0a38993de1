"""What a comparison needs of its device. Tests use the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import kddp_ext
from benchmarks.cases import Inputs
from benchmarks.gpu.clocks import Clock, EventClock, Step, WallClock
from kddp_ext.ops import cuda

CAPTURE_WARM_UP = 3  # steps before a capture, as in PyTorch's notes on CUDA graphs


class Device(NamedTuple):
    """A device.

    Attributes:
        name: for torch.device.
        cold: times single calls with cold caches.
        repeated: times consecutive calls.
        peak_bytes: the peak memory that a step allocates, given its inputs.
        capture: returns a step that replays a captured one; None if the device cannot capture.
    """

    name: str
    cold: Clock
    repeated: Clock
    peak_bytes: Callable[[Step, Inputs], int]
    capture: Callable[[Step], Step] | None


def why_not() -> str | None:
    """One sentence that says why no GPU can be measured, or None."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no CUDA device: --device cuda needs an NVIDIA GPU and a build for it."
    if not kddp_ext.build_info()["cuda"]:
        return (
            "This build of kddp_ext has no CUDA kernels, which --device cuda measures: build them with "
            "pip install . -C cmake.define.KDDP_CUDA=ON"
        )
    return cuda.why_unusable(torch.device("cuda", 0))


def gpu() -> Device:
    """The current CUDA device."""
    return Device("cuda", EventClock(), WallClock(torch.cuda.synchronize), peak_bytes, captured)


def peak_bytes(step: Step, inputs: Inputs) -> int:
    """The peak of PyTorch's allocator, minus what was allocated before."""
    for leaf in inputs.leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(step: Step) -> Step:
    """Captures one call as a CUDA graph. Returns a step that replays it.

    Raises:
        RuntimeError: The step cannot be captured, for example because it reads a result.
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
