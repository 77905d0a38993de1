"""The latest values of a layer's neurons: some of each batch, up to a fixed number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kddp_ext.activations.layout import NeuronMatrix

_BATCHES = 8  # each batch fills at most this part of the ring, so that the ring spans several batches
# Multiples of the golden ratio are spread evenly over samples and positions for every size (Weyl).
_GOLDEN = 0.6180339887498949


class SampleRing:
    """Up to `capacity` samples of H neurons; new samples replace the oldest.

    Args:
        capacity: at least 1.
        width: number of neurons H.
        device: where the samples are stored.

    Attributes:
        values: (capacity, H) float32; the first `filled` rows contain samples.
        taken: number of samples added so far.
    """

    def __init__(self, capacity: int, width: int, device: torch.device | str | None = None) -> None:
        with torch.inference_mode(False):  # later writes may happen outside inference mode
            self.values = torch.zeros(capacity, width, dtype=torch.float32, device=device)
        self.taken = 0

    @property
    def filled(self) -> int:
        """Number of samples in the ring."""
        return min(self.taken, self.values.shape[0])

    @property
    def samples(self) -> Tensor:
        """(filled, H) float32, in no particular order."""
        return self.values[: self.filled]

    def add(self, matrix: NeuronMatrix) -> None:
        """Add some samples of `matrix`, spread evenly over it. The next call takes other positions."""
        capacity, width = self.values.shape
        count = min(matrix.samples, -(-capacity // _BATCHES))
        if count == 0:
            return
        outer, inner = matrix.layout.outer, matrix.layout.inner
        entries = matrix.values.detach().unflatten(1, (outer, width, inner))
        number = torch.arange(count, device=entries.device, dtype=torch.float64) + self.taken
        sample = (number * _GOLDEN % 1 * matrix.samples).long()
        row, position = sample // (outer * inner), sample % (outer * inner)
        slots = (torch.arange(count, device=entries.device) + self.taken) % capacity
        self.values[slots] = entries[row, position // inner, :, position % inner].float()
        self.taken += count

    def fill(self, samples: Tensor) -> None:
        """Replace the content by `samples`, (S, H); if they are too many, by evenly spread ones."""
        count = min(len(samples), self.values.shape[0])
        chosen = torch.arange(count, device=samples.device) * len(samples) // max(count, 1)
        self.values[:count] = samples[chosen]
        self.taken = count

    def reset(self) -> None:
        """Remove all samples."""
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        """A copy that `load_state_dict` restores exactly."""
        return {"values": self.samples.clone(), "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            ValueError: the state has another width or more samples than `capacity`; nothing is changed.
        """
        values, taken = state["values"], int(state["taken"])
        capacity, width = self.values.shape
        if values.dim() != 2 or values.shape[1] != width or values.shape[0] != min(taken, capacity):
            raise ValueError(
                f"state: expected at most {capacity} samples of {width} neurons, got a tensor of shape "
                f"{tuple(values.shape)} and a count of {taken}"
            )
        self.values[: len(values)] = values.to(self.values)
        self.taken = taken
