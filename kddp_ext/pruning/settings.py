"""The arguments of `DynamicPruner` that are plain values, checked once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from torch import Tensor

from kddp_ext.activations.statistics import NeuronStatistics
from kddp_ext.loss.settings import check_number, check_weight
from kddp_ext.pruning.ranking import Resource

CRITERIA = ("contribution", "mean_activation", "apoz", "dead", "saliency")

Criterion = Callable[[NeuronStatistics, Tensor], Tensor]
"""A function that gives each of a layer's H neurons an activity, (H,), finite and not negative.

The higher the activity, the more is lost with the neuron. Its arguments, both on the CPU, are the sums over the samples
since the last check and ‖W2[:,j]‖₂ of the weights that read each neuron, (H,) float64. The built-in criteria give
activities in [0, 1], except "saliency"; docs/pruning.md compares them.
"""

RESOURCES = ("macs", "parameters")
DEFAULT_LOSS_BUDGET = 0.01  # of criterion "saliency" without a target

Streams = Literal["exact", "all"]
"""Whether neurons are pruned that a normalisation, such as LayerNorm, computes together ("all") or not ("exact")."""


def check_streams(streams: object) -> Streams:
    """`streams`, if it is an option."""
    if streams not in get_args(Streams):
        raise ValueError(f"streams: expected 'exact' or 'all', got {streams!r}")
    return streams  # type: ignore[return-value]


@dataclass(frozen=True)
class PruningSettings:
    """The arguments of `DynamicPruner` that its decisions depend on, described there and checked here."""

    criterion: str | Criterion = "contribution"
    threshold: float = 0.01
    patience: int = 2
    minimum_width: int = 1
    round_to: int = 1
    maximum_share: float = 1.0
    target_parameters: int | float | None = None
    target_macs: int | float | None = None
    target_steps: int = 1
    resource: str | Resource | None = None
    loss_budget: float | None = None
    compensate: bool = True
    reconstruction_samples: int = 256

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA if isinstance(self.criterion, str) else not callable(self.criterion):
            raise ValueError(
                f"criterion: expected one of {', '.join(CRITERIA)}, or a function of a layer's statistics and the "
                f"norms of its outgoing weights, got {self.criterion!r}"
            )
        if not isinstance(self.compensate, bool):
            raise TypeError(f"compensate: expected True or False, got {self.compensate!r}")
        # The activities of a user's function need not be relative to anything.
        highest = 1.0 if isinstance(self.criterion, str) else sys.float_info.max
        object.__setattr__(self, "threshold", _positive("threshold", self.threshold, at_most=highest))
        object.__setattr__(self, "maximum_share", _positive("maximum_share", self.maximum_share, at_most=1.0))
        for name in ("patience", "minimum_width", "round_to", "target_steps"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), at_least=1))
        for name in ("target_parameters", "target_macs"):
            object.__setattr__(self, name, _target(name, getattr(self, name)))
        is_named = self.resource is None or (isinstance(self.resource, str) and self.resource in RESOURCES)
        if not is_named and not callable(self.resource):
            raise ValueError(
                f"resource: expected {', '.join(RESOURCES)}, a function of the widths by layer, or None, got "
                f"{self.resource!r}"
            )
        if self.loss_budget is not None:
            if self.criterion != "saliency":
                raise ValueError(
                    f"loss_budget: expected None with criterion {self.criterion!r}, since only 'saliency' predicts the "
                    f"loss, got {self.loss_budget!r}"
                )
            object.__setattr__(
                self, "loss_budget", _positive("loss_budget", self.loss_budget, at_most=sys.float_info.max)
            )
        samples = whole_number("reconstruction_samples", self.reconstruction_samples, at_least=0)
        object.__setattr__(self, "reconstruction_samples", samples)


@dataclass(frozen=True)
class Schedule:
    """The arguments of `DynamicPruner` that count training steps, described there and checked here."""

    interval: int | None = None
    start: int = 0
    l1_weight: float = 0.0
    l1_warmup: int = 0

    def __post_init__(self) -> None:
        if self.interval is not None:
            object.__setattr__(self, "interval", whole_number("interval", self.interval, at_least=1))
        object.__setattr__(self, "start", whole_number("start", self.start, at_least=0))
        check_weight("l1_weight", self.l1_weight)
        object.__setattr__(self, "l1_warmup", whole_number("l1_warmup", self.l1_warmup, at_least=0))
        if self.start and self.interval is None:
            raise ValueError(f"start: {self.start} delays the checks that step() makes, but interval is None")
        if self.l1_warmup and not self.l1_weight:
            raise ValueError(f"l1_warmup: l1_weight rises over {self.l1_warmup} steps, but it is 0")


def _target(name: str, value: object) -> int | float | None:
    """A number of at least 1, or a share of the model's size: a float of at most 1."""
    if value is None:
        return None
    if not isinstance(value, float):
        return whole_number(name, value, at_least=1)
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a whole number, or a share above 0 and at most 1, got {value!r}")
    return value


def whole_number(name: str, value: object, *, at_least: int) -> int:
    """`value` as an int of at least `at_least` and below 2**63, which tensors can hold."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    number = int(value)
    if number < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
    if number >= 2**63:
        raise ValueError(f"{name}: expected less than 2**63, got more")
    return number


def _positive(name: str, value: float, *, at_most: float) -> float:
    check_number(name, value)
    if not 0 < value <= at_most:  # also refuses NaN
        raise ValueError(f"{name}: expected more than 0 and at most {at_most:.2g}, got {value!r}")
    return float(value)
