"""The implementations that are compared on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.cases import Inputs, contenders, fused, require_agreement, step
from benchmarks.gpu import liger
from benchmarks.gpu.clocks import Step
from benchmarks.gpu.device import Device
from benchmarks.settings import Settings

LIGER, GRAPH = "Liger", ", CUDA graph"


class Contenders(NamedTuple):
    """The steps by implementation, and the reasons why others are missing."""

    steps: dict[str, Step]
    missing: dict[str, str]


def all_contenders(inputs: Inputs, settings: Settings, device: Device) -> Contenders:
    """Forward and backward of the loss, by implementation. Results must agree with those of PyTorch."""
    steps: dict[str, Step] = dict(contenders(inputs, settings))
    missing: dict[str, str] = {}
    _add_liger(inputs, steps, missing)
    if device.capture is not None:
        for name in ("kddp_ext", "eager"):
            _add_graph(name, steps, missing, device.capture)
    return Contenders(steps, missing)


def _add_graph(name: str, steps: dict[str, Step], missing: dict[str, str], capture: Callable[[Step], Step]) -> None:
    try:
        steps[name + GRAPH] = capture(steps[name])
    except RuntimeError as error:
        missing[name + GRAPH] = f"failed: {error}"


def _add_liger(inputs: Inputs, steps: dict[str, Step], missing: dict[str, str]) -> None:
    try:
        loss = liger.loss()
        require_agreement({"eager": fused, LIGER: loss}, inputs)
        steps[LIGER] = partial(step, loss, inputs)
    except ImportError:
        missing[LIGER] = "not installed"
    except Exception as error:  # an error of another package must not end the run
        missing[LIGER] = f"failed: {type(error).__name__}: {error}"
