"""Ranks the neurons of all layers together: which ones are worth least for what their removal saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from torch import Tensor

from kddp_ext.pruning.model_size import RemainingSize

Resource = Callable[[Mapping[str, int]], float]
"""A function that gives the cost of the model with these numbers of neurons by layer, for example its latency.

The more neurons there are, the higher the cost. It is called for each neuron that might be the next to go.
"""


@dataclass(frozen=True)
class RankedStep:
    """What is left once the neurons up to this step of the ranking are removed.

    Attributes:
        parameters: of the whole model.
        macs: multiply-accumulates of the whole model for one sample.
        activity: the sum of the removed neurons' activities; with saliency, the predicted increase of the loss.
    """

    parameters: int
    macs: int
    activity: float


def rank(
    activities: Sequence[Tensor],
    remaining: RemainingSize,
    round_to: int,
    resource: str | Resource | None,
    enough: Callable[[RankedStep], bool],
    budget: float = math.inf,
) -> list[RankedStep]:
    """Take neurons from `remaining`, the least valuable first, until what is left is small `enough`.

    Args:
        activities: those of each group's removable neurons, ascending, in the order in which `remaining` loses them.
        round_to: as many neurons go at once as it takes to reach the next multiple of this width.
        resource: "macs", "parameters" or a function. Steps are then ranked by the sum of their neurons' activities
            for each unit that they save. The saving is that at the step, when other layers are narrower already.
            None: they are ranked by the activity of their strongest neuron.
        enough: called before each step with what is left.
        budget: nothing more goes once the activities of the removed neurons would add up to more than this.

    Returns:
        What was left before the first step and after each one. Among equals, the first layer and the lowest index stay.
    """
    steps = [_Steps(each.tolist(), width, round_to) for each, width in zip(activities, remaining.widths.values(),
                                                                          strict=True)]  # fmt: skip
    heap = [(0.0, -group, group) for group, each in enumerate(steps) if each.counts]  # 0 is below every score
    heapify(heap)
    spent = 0.0
    left = [RankedStep(round(remaining.parameters), round(remaining.macs), spent)]
    while heap and not enough(left[-1]):
        known, _, group = heappop(heap)
        score = _score(steps[group], group, remaining, resource)
        # The less is left, the less a step saves and the higher is its score. So a score that is still the lowest
        # after it was brought up to date is the lowest of all (a lazy greedy algorithm, Minoux 1978).
        if score > known and heap and (score, -group) > heap[0][:2]:
            heappush(heap, (score, -group, group))
            continue
        step = steps[group]
        spent += step.activity
        if spent > budget:
            break
        remaining.remove(group, step.count)
        left.append(RankedStep(round(remaining.parameters), round(remaining.macs), spent))
        step.taken += 1
        if step.taken < len(step.counts):
            heappush(heap, (score, -group, group))
    return left


class _Steps:
    """The steps in which the removable neurons of a group may go, and how many of them were taken."""

    def __init__(self, activities: list[float], width: int, round_to: int) -> None:
        self.counts = list(range(width % round_to or round_to, len(activities) + 1, round_to))
        self.taken = 0
        self._activities = activities

    @property
    def count(self) -> int:
        """How many neurons have gone after the next step."""
        return self.counts[self.taken]

    @property
    def strongest(self) -> float:
        """The highest activity of the neurons of the next step."""
        return self._activities[self.count - 1]

    @property
    def activity(self) -> float:
        """The sum of their activities."""
        return sum(self._activities[self.counts[self.taken - 1] if self.taken else 0 : self.count])


def saving(remaining: RemainingSize, group: int, count: int, resource: str | Resource) -> float:
    """What the next neurons of a group save, until `count` are gone."""
    if callable(resource):
        widths = remaining.widths
        name = [*widths][group]
        return resource(widths) - resource({**widths, name: widths[name] - count + remaining.gone[group]})
    parameters, macs = remaining.saved(group, count)
    return macs if resource == "macs" else parameters


def _score(step: _Steps, group: int, remaining: RemainingSize, resource: str | Resource | None) -> float:
    if resource is None:
        return step.strongest
    if step.activity == 0:
        return 0.0
    saved = saving(remaining, group, step.count, resource)
    return step.activity / saved if saved > 0 else math.inf
