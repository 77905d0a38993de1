"""What pruning needs to know of a layer's neurons, summed exactly while the loss reads the activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kddp_ext import ops

# The rows of a statistics tensor, in the order in which the kernels write them.
STATISTICS = ("sum_abs", "sum", "sum_squares", "nonzero", "max_abs")
_SUMS, _MAX_ABS = slice(0, 4), 4


class NeuronStatistics:
    """Running sums over the activations of one layer, one entry a neuron.

    Everything is float64: sums of many batches must neither lose the small activations of a nearly dead
    neuron nor turn the variance of a constant one into rounding noise.

    Args:
        width: number of neurons H.
        device: where the sums live; that of the activations by default.

    Attributes:
        values: (5, H) float64, the rows named by `STATISTICS`.
        rows: number of samples summed so far.
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.values = torch.zeros(len(STATISTICS), width, dtype=torch.float64, device=device)
        self.rows = 0

    def __repr__(self) -> str:
        return f"NeuronStatistics(width={self.width}, rows={self.rows})"

    @property
    def width(self) -> int:
        """Number of neurons H."""
        return self.values.shape[1]

    @property
    def sum_abs(self) -> Tensor:
        """Σ|a|, (H,)."""
        return self.values[0]

    @property
    def sum(self) -> Tensor:
        """Σa, (H,)."""
        return self.values[1]

    @property
    def sum_squares(self) -> Tensor:
        """Σa², (H,)."""
        return self.values[2]

    @property
    def nonzero(self) -> Tensor:
        """Number of samples in which the neuron was not exactly zero, (H,)."""
        return self.values[3]

    @property
    def max_abs(self) -> Tensor:
        """max|a|, (H,)."""
        return self.values[4]

    @property
    def mean(self) -> Tensor:
        """Mean activation, (H,); NaN before any sample."""
        return self.sum / self.rows if self.rows else torch.full_like(self.sum, torch.nan)

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute activation, (H,); NaN before any sample."""
        return self.sum_abs / self.rows if self.rows else torch.full_like(self.sum, torch.nan)

    @property
    def std(self) -> Tensor:
        """Standard deviation over the samples (dividing by their number), (H,); NaN before any sample."""
        if not self.rows:
            return torch.full_like(self.sum, torch.nan)
        variance = self.sum_squares / self.rows - self.mean.square()
        # A constant neuron's variance is the difference of two equal numbers: what rounding leaves of it is 0.
        noise = self.sum_squares / self.rows * 1e-14
        return torch.where(variance > noise, variance, variance * 0).sqrt()

    @property
    def active_fraction(self) -> Tensor:
        """Share of the samples in which the neuron was not exactly zero, (H,); NaN before any sample."""
        return self.nonzero / self.rows if self.rows else torch.full_like(self.sum, torch.nan)

    def update(self, values: Tensor, rows: int) -> None:
        """Add the sums of another `rows` samples, (5, H) float64 as the native loss returns them."""
        if values.shape != self.values.shape:
            raise ValueError(
                f"values: expected shape {tuple(self.values.shape)} (statistics, neurons), got {tuple(values.shape)}"
            )
        self.values[_SUMS] += values[_SUMS]
        self.values[_MAX_ABS] = torch.maximum(self.values[_MAX_ABS], values[_MAX_ABS])
        self.rows += rows

    def observe(self, activation: Tensor) -> None:
        """Add the samples of `activation`, (N, H), without computing a loss."""
        self.update(ops.neuron_statistics(activation.detach()), activation.shape[0])

    def reset(self) -> None:
        """Forget every sample."""
        self.values.zero_()
        self.rows = 0

    def select(self, keep: Tensor) -> NeuronStatistics:
        """The statistics of the neurons `keep`, (K,) int64, in that order."""
        selected = NeuronStatistics(int(keep.numel()), self.values.device)
        selected.values = self.values.index_select(1, keep.to(self.values.device))
        selected.rows = self.rows
        return selected

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sums that `load_state_dict` restores exactly."""
        return {"values": self.values.clone(), "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is of a layer of another width; nothing is changed then.
        """
        values = state["values"]
        if values.shape != self.values.shape:
            raise ValueError(
                f"state: expected statistics of {self.width} neurons, got a tensor of shape {tuple(values.shape)}"
            )
        self.values = values.to(self.values, copy=True)
        self.rows = int(state["rows"])


class TrackedActivations(tuple[Tensor, ...]):
    """The penalised activations of one forward pass, with the statistics that they add to.

    It is a tuple of tensors, (N, H) each. `fused_kd_l1_loss` adds the batch to `statistics` in the pass that
    computes the penalty, where gradients are being computed (so that a validation pass leaves no trace).
    """

    statistics: tuple[NeuronStatistics, ...]

    def __new__(cls, tensors: Iterable[Tensor], statistics: Sequence[NeuronStatistics]) -> TrackedActivations:
        self = super().__new__(cls, tensors)
        if len(self) != len(statistics):
            raise ValueError(f"statistics: expected one for each of {len(self)} activations, got {len(statistics)}")
        self.statistics = tuple(statistics)
        return self

    def observe(self) -> None:
        """Add the batch to the statistics without computing a loss."""
        for activation, statistics in zip(self, self.statistics, strict=True):
            statistics.observe(activation)
