"""What a `DynamicPruner` decides by: its arguments, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from kddp_ext.pruning.criteria import CRITERIA, Criterion
from kddp_ext.pruning.validation import at_least_one, positive, share, whole_number


@dataclass(frozen=True)
class PruningSettings:
    """The arguments of `DynamicPruner` that its decisions depend on; described there.

    Raises:
        TypeError, ValueError: one is wrong; the message names it.
    """

    criterion: str | Criterion = "contribution"
    threshold: float = 0.01
    patience: int = 2
    minimum_width: int = 1
    round_to: int = 1
    maximum_share: float = 1.0
    target_parameters: int | None = None
    target_macs: int | None = None
    compensate: bool = True
    reconstruction_samples: int = 256

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA if isinstance(self.criterion, str) else not callable(self.criterion):
            raise ValueError(
                f"criterion: expected one of {', '.join(CRITERIA)}, or a function of a layer's statistics and "
                f"the norms of its outgoing weights, got {self.criterion!r}"
            )
        if not isinstance(self.compensate, bool):
            raise TypeError(f"compensate: expected True or False, got {self.compensate!r}")
        # A function's activities need not be relative to anything.
        bound = share if isinstance(self.criterion, str) else positive
        object.__setattr__(self, "threshold", bound("threshold", self.threshold))
        object.__setattr__(self, "maximum_share", share("maximum_share", self.maximum_share))
        for name in ("patience", "minimum_width", "round_to"):
            object.__setattr__(self, name, at_least_one(name, getattr(self, name)))
        samples = whole_number("reconstruction_samples", self.reconstruction_samples, at_least=0)
        object.__setattr__(self, "reconstruction_samples", samples)
        for name in ("target_parameters", "target_macs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, at_least_one(name, getattr(self, name)))

    @property
    def samples(self) -> int:
        """How many values of each neuron are to be kept."""
        return self.reconstruction_samples if self.compensate else 0

    @property
    def activity_bound(self) -> float:
        """A neuron is inactive where its activity is below this."""
        return 1.0 if self.criterion == "dead" else self.threshold
