"""When a pruner checks by itself, and how the penalty's weight rises."""

from __future__ import annotations

from dataclasses import dataclass

from kddp_ext.pruning.validation import at_least_one, not_negative, whole_number


@dataclass(frozen=True)
class Schedule:
    """The arguments of `DynamicPruner` that count training steps; described there.

    Raises:
        TypeError, ValueError: one is wrong; the message names it.
    """

    interval: int | None = None
    start: int = 0
    l1_weight: float = 0.0
    l1_warmup: int = 0

    def __post_init__(self) -> None:
        if self.interval is not None:
            object.__setattr__(self, "interval", at_least_one("interval", self.interval))
        object.__setattr__(self, "start", whole_number("start", self.start, at_least=0))
        object.__setattr__(self, "l1_weight", not_negative("l1_weight", self.l1_weight))
        object.__setattr__(self, "l1_warmup", whole_number("l1_warmup", self.l1_warmup, at_least=0))
        if self.start and self.interval is None:
            raise ValueError(f"start: {self.start} delays the checks that step() makes, and interval is None")
        if self.l1_warmup and not self.l1_weight:
            raise ValueError(f"l1_warmup: in {self.l1_warmup} steps l1_weight is to rise, and it is 0")

    def interval_ends(self, steps: int) -> bool:
        """Whether an interval is over with this step, counted from 1."""
        return self.interval is not None and steps % self.interval == 0

    def check_due(self, steps: int) -> bool:
        """Whether this step, counted from 1, is one to check at."""
        return self.interval_ends(steps) and steps >= self.start

    def l1_weight_after(self, steps: int) -> float:
        """The penalty's weight for the loss that follows so many steps."""
        return self.l1_weight * min(1.0, steps / self.l1_warmup) if self.l1_warmup else self.l1_weight
