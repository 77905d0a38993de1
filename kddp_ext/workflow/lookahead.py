"""Weights that follow the optimizer's from behind, and that the optimizer goes on from (Zhang et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 5  # of the optimizer between two of the slow weights'; Jordan's (2024) choice
_DECAY = 0.95**STEPS


class Lookahead:
    """Slow weights of a model in training, running statistics included.

    Every `STEPS` steps they move towards the model's, which are then set to them. The share that they keep rises
    with the cube of the position in the training, to 0.77: at first the model is left alone, towards the end its
    noise is averaged away (Jordan 2024). After a step of theirs nothing of them needs to be kept: they are the
    model's.

    Args:
        model: whose weights they start from.
    """

    def __init__(self, model: nn.Module) -> None:
        self._fast: list[Tensor] = [each for each in model.state_dict().values() if each.is_floating_point()]
        self._slow = [each.clone() for each in self._fast]

    @torch.no_grad()
    def step(self, position: float) -> None:
        """Move the slow weights, and set the model's to them.

        Args:
            position: in the training, 0 at its start to 1 at its end.
        """
        kept = _DECAY * position**3
        for slow, fast in zip(self._slow, self._fast, strict=True):
            fast.copy_(slow.lerp_(fast, 1 - kept))
