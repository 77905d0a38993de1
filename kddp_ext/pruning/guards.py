"""What may go of a layer's marked neurons: never too many, and always the weakest first."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from torch import Tensor


@dataclass(frozen=True)
class KeptBy:
    """How many neurons that were inactive for long enough stay all the same, by what keeps them.

    The guards are asked in this order; each counts what those before it let go.

    Attributes:
        minimum_width: the layer would get narrower than that.
        maximum_share: too many of the layer would go in one prune.
        round_to: the width left would be no multiple of it.
        budget: the model is small enough without, by `target_parameters` and `target_macs`.
    """

    minimum_width: int = 0
    maximum_share: int = 0
    round_to: int = 0
    budget: int = 0

    @property
    def total(self) -> int:
        """By all of them together."""
        return int(sum(astuple(self)))


def removable(
    marked: Tensor, activity: Tensor, *, minimum_width: int = 1, maximum_share: float = 1.0, round_to: int = 1
) -> tuple[Tensor, KeptBy]:
    """The marked neurons that a layer's own guards let go, weakest first.

    The width left is at least `minimum_width`, at least 1 - `maximum_share` of the present one, and a multiple
    of `round_to` (or the present width). What stays of the marked are the most active, the first among equals.

    Args:
        marked: (H,) bool.
        activity: (H,) float64.
        minimum_width: at least 1.
        maximum_share: in (0, 1].
        round_to: at least 1.

    Returns:
        int64 indices, the first to go first; and what keeps the others.
    """
    width = marked.numel()
    candidates = marked.nonzero().flatten().flip(0)
    weakest_first = candidates[activity[candidates].argsort(stable=True)]
    by_width = min(len(candidates), max(0, width - minimum_width))
    # 0.29 · 100 is 28.999999999999996: what is a whole number in decimals counts as one.
    by_share = min(by_width, math.floor(maximum_share * width + 1e-9))
    rounded_up = -(-(width - by_share) // round_to) * round_to
    by_rounding = width - min(width, rounded_up)
    kept_by = KeptBy(len(candidates) - by_width, by_width - by_share, by_share - by_rounding)
    return weakest_first[:by_rounding], kept_by


def removal_steps(width: int, count: int, round_to: int) -> list[int]:
    """How many neurons can be gone on the way to `count`: those after which the width is a multiple of `round_to`.

    Ascending, without 0; `count` is the last, or is 0 itself.
    """
    first = width % round_to or round_to
    return list(range(first, count + 1, round_to))
