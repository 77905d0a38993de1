"""The latest values of a layer's neurons: a few of each batch, as many as there is room for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kddp_ext.activations.layout import NeuronMatrix

# Of a batch so many parts of the ring are filled, so that it spans several batches.
_BATCHES = 8
# Multiples of it spread evenly over samples and positions, and keep step with no size (Weyl).
_GOLDEN = 0.6180339887498949


class SampleRing:
    """Up to `capacity` samples of H neurons; new ones take the place of the oldest.

    Args:
        capacity: how many, at least 1.
        width: number of neurons H.
        device: where they live.

    Attributes:
        values: (capacity, H) float32; the first `filled` rows hold samples.
        taken: samples taken so far.
    """

    def __init__(self, capacity: int, width: int, device: torch.device | str | None = None) -> None:
        with torch.inference_mode(False):  # it is written to outside of that mode as well
            self.values = torch.zeros(capacity, width, dtype=torch.float32, device=device)
        self.taken = 0

    @property
    def filled(self) -> int:
        """How many samples there are."""
        return min(self.taken, self.values.shape[0])

    @property
    def samples(self) -> Tensor:
        """(filled, H) float32, in no order that means anything."""
        return self.values[: self.filled]

    def add(self, matrix: NeuronMatrix) -> None:
        """Take some of the samples of `matrix`, evenly spread; other ones of the next."""
        capacity, width = self.values.shape
        count = min(matrix.samples, -(-capacity // _BATCHES))
        if count == 0:
            return
        entries = matrix.values.detach().unflatten(1, (matrix.outer, width, matrix.inner))
        number = torch.arange(count, device=entries.device, dtype=torch.float64) + self.taken
        at = (number * _GOLDEN % 1 * matrix.samples).long()
        row, within = at // (matrix.outer * matrix.inner), at % (matrix.outer * matrix.inner)
        slots = (torch.arange(count, device=entries.device) + self.taken) % capacity
        self.values[slots] = entries[row, within // matrix.inner, :, within % matrix.inner].float()
        self.taken += count

    def fill(self, samples: Tensor) -> None:
        """Hold `samples`, (S, H), instead of what there is; of more than there is room for, evenly spread ones."""
        count = min(len(samples), self.values.shape[0])
        chosen = torch.arange(count, device=samples.device) * len(samples) // max(count, 1)
        self.values[:count] = samples[chosen]
        self.taken = count

    def reset(self) -> None:
        """Forget all samples."""
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        """A copy that `load_state_dict` restores exactly."""
        return {"values": self.samples.clone(), "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is of another width, or of more samples than there is room for; nothing is changed then.
        """
        values, taken = state["values"], int(state["taken"])
        capacity, width = self.values.shape
        if values.dim() != 2 or values.shape[1] != width or values.shape[0] != min(taken, capacity):
            raise ValueError(
                f"state: expected at most {capacity} samples of {width} neurons, got a tensor of shape "
                f"{tuple(values.shape)} and {taken} taken"
            )
        self.values[: len(values)] = values.to(self.values)
        self.taken = taken
