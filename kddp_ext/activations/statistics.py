"""What pruning needs to know of a layer's neurons, summed exactly while the loss reads the activations."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kddp_ext import ops
from kddp_ext.activations.layout import NeuronMatrix, as_matrix
from kddp_ext.activations.sample_ring import SampleRing

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
        positions: entries that each neuron has in a sample, where their sums are to be kept apart; None where not.
        samples: how many of the latest values of each neuron are kept beside the sums; 0 for none.

    Attributes:
        values: (5, H) float64, the rows named by `STATISTICS`.
        position_sums: (H, positions) float64, Σa of each entry of a neuron; None without positions.
        ring: the latest values, None without samples.
        rows: number of samples summed so far; with several positions, of values of each neuron.
    """

    def __init__(
        self,
        width: int,
        device: torch.device | str | None = None,
        *,
        positions: int | None = None,
        samples: int = 0,
    ) -> None:
        self.position_sums: Tensor | None = None
        with torch.inference_mode(False):  # they are added to outside of that mode as well
            self.values = torch.zeros(len(STATISTICS), width, dtype=torch.float64, device=device)
            if positions is not None:
                self.position_sums = torch.zeros(width, positions, dtype=torch.float64, device=device)
        self.ring = SampleRing(samples, width, device) if samples else None
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
    def position_mean(self) -> Tensor:
        """Mean of each entry of a neuron, (H, positions), or (H, 1) without positions; NaN before any sample."""
        if self.position_sums is None:
            return self.mean[:, None]
        positions = self.position_sums.shape[1]
        return self.position_sums * positions / self.rows if self.rows else self.position_sums * torch.nan

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

    def update(self, sums: Tensor, matrix: NeuronMatrix) -> None:
        """Add what the kernels have summed over the rows of `matrix`: (5, columns) float64."""
        outer, inner = matrix.outer, matrix.inner
        if sums.shape != (len(STATISTICS), outer * self.width * inner):
            raise ValueError(
                f"sums: expected shape {(len(STATISTICS), outer * self.width * inner)} (statistics, entries of "
                f"neurons), got {tuple(sums.shape)}"
            )
        if outer * inner > 1:
            entries = sums.view(len(STATISTICS), outer, self.width, inner)
            if self.position_sums is not None:
                self.position_sums += entries[1].movedim(1, 0).flatten(1)
            sums = torch.cat([entries[_SUMS].sum((1, 3)), entries[_MAX_ABS:].amax((1, 3))])
        elif self.position_sums is not None:
            self.position_sums += sums[1][:, None]
        if self.ring is not None:
            self.ring.add(matrix)
        self.values[_SUMS] += sums[_SUMS]
        self.values[_MAX_ABS] = torch.maximum(self.values[_MAX_ABS], sums[_MAX_ABS])
        self.rows += matrix.samples

    def matrix(self, activation: Tensor, axis: int = 1) -> NeuronMatrix:
        """The matrix of `activation`, in which the neurons lie along `axis`, that is to be summed."""
        return as_matrix(activation, axis, keep_positions=self.position_sums is not None)

    def observe(self, activation: Tensor, axis: int = 1) -> None:
        """Add the samples of `activation`, without computing a loss.

        Args:
            activation: of at least 2 dimensions; float32, float64, bfloat16 or float16.
            axis: the dimension that the H neurons are, from the last where it is negative; all others are samples and
                positions.

        Raises:
            TypeError, ValueError: it is not of such a dtype or shape; nothing is added then.
        """
        if activation.dtype not in ops.ELEMENT_TYPES:
            raise TypeError(f"activation: expected dtype float32, float64, bfloat16 or float16, got {activation.dtype}")
        dimensions = activation.dim()
        if dimensions < 2 or not -dimensions <= axis < dimensions or activation.shape[axis] != self.width:
            raise ValueError(
                f"activation: expected at least 2 dimensions, and {self.width} neurons along dimension {axis}, got "
                f"shape {tuple(activation.shape)}"
            )
        matrix = self.matrix(activation.detach(), axis)
        self.update(ops.neuron_statistics(matrix.values), matrix)

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        """Move the sums to `device`, where they are not there."""
        if self.values.device != device:
            self.values = self.values.to(device)
            if self.position_sums is not None:
                self.position_sums = self.position_sums.to(device)
            if self.ring is not None:
                self.ring.values = self.ring.values.to(device)

    def reset(self) -> None:
        """Forget every sample."""
        self.values.zero_()
        if self.position_sums is not None:
            self.position_sums.zero_()
        if self.ring is not None:
            self.ring.reset()
        self.rows = 0

    @classmethod
    def joined(cls, parts: Sequence[NeuronStatistics]) -> NeuronStatistics:
        """The statistics of all samples of `parts`, of the same neurons on one device, added in their order."""
        joined = copy.deepcopy(parts[0])
        for part in parts[1:]:
            joined.values[_SUMS] += part.values[_SUMS]
            joined.values[_MAX_ABS] = torch.maximum(joined.values[_MAX_ABS], part.values[_MAX_ABS])
            if joined.position_sums is not None and part.position_sums is not None:
                joined.position_sums += part.position_sums
            joined.rows += part.rows
        rings = [part.ring for part in parts if part.ring is not None]
        if joined.ring is not None:
            joined.ring.fill(torch.cat([ring.samples for ring in rings]))
        return joined

    def select(self, keep: Tensor) -> NeuronStatistics:
        """The sums of the neurons `keep`, (K,) int64, in that order, without their latest values."""
        selected = NeuronStatistics(int(keep.numel()), self.values.device)
        keep = keep.to(self.values.device)
        selected.values = self.values.index_select(1, keep)
        if self.position_sums is not None:
            selected.position_sums = self.position_sums.index_select(0, keep)
        selected.rows = self.rows
        return selected

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sums that `load_state_dict` restores exactly."""
        state = {"values": self.values.clone(), "rows": self.rows}
        if self.position_sums is not None:
            state["position_sums"] = self.position_sums.clone()
        if self.ring is not None:
            state["ring"] = self.ring.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is of a layer of another width or of other positions; nothing is changed then.
        """
        values, rows = state["values"], int(state["rows"])
        if values.shape != self.values.shape:
            raise ValueError(
                f"state: expected statistics of {self.width} neurons, got a tensor of shape {tuple(values.shape)}"
            )
        sums = state.get("position_sums")
        if (sums is None) != (self.position_sums is None) or (
            sums is not None and self.position_sums is not None and sums.shape != self.position_sums.shape
        ):
            wanted = "no sums" if self.position_sums is None else f"sums of shape {tuple(self.position_sums.shape)}"
            raise ValueError(
                f"state: expected {wanted} of positions, got {None if sums is None else tuple(sums.shape)}"
            )
        if self.ring is not None and "ring" in state:
            self.ring.load_state_dict(state["ring"])
        elif self.ring is not None:  # it fills anew
            self.ring.reset()
        if sums is not None and self.position_sums is not None:
            self.position_sums.copy_(sums)
        self.values.copy_(values)
        self.rows = rows


class TrackedActivations(tuple[Tensor, ...]):
    """The penalised activations of one forward pass, with the statistics that they add to.

    It is a tuple of tensors. `fused_kd_l1_loss` adds the batch to `statistics` in the pass that
    computes the penalty, where gradients are being computed (so that a validation pass leaves no trace).

    Attributes:
        statistics: one for each tensor.
        axes: of each tensor the dimension that its neurons are; 1 by default. All others are samples and positions.
    """

    statistics: tuple[NeuronStatistics, ...]
    axes: tuple[int, ...]

    def __new__(
        cls, tensors: Iterable[Tensor], statistics: Sequence[NeuronStatistics], axes: Sequence[int] | None = None
    ) -> TrackedActivations:
        self = super().__new__(cls, tensors)
        self.statistics = tuple(statistics)
        self.axes = (1,) * len(self) if axes is None else tuple(axes)
        for name, given in (("statistics", self.statistics), ("axes", self.axes)):
            if len(self) != len(given):
                raise ValueError(f"{name}: expected one for each of {len(self)} activations, got {len(given)}")
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        """For copies and pickles, which make a tuple of its contents alone."""
        return tuple(self), self.statistics, self.axes

    def matrices(self) -> list[NeuronMatrix]:
        """Each activation as a matrix that can be summed for its statistics."""
        return [
            statistics.matrix(activation, axis)
            for activation, statistics, axis in zip(self, self.statistics, self.axes, strict=True)
        ]

    def update(self, matrices: Sequence[NeuronMatrix], sums: Tensor) -> None:
        """Add what the kernels have summed of `matrices`: (5, columns of all) float64."""
        column = 0
        for matrix, statistics in zip(matrices, self.statistics, strict=True):
            width = matrix.values.shape[1]
            statistics.update(sums[:, column : column + width], matrix)
            column += width

    def observe(self) -> None:
        """Add the batch to the statistics without computing a loss."""
        for activation, statistics, axis in zip(self, self.statistics, self.axes, strict=True):
            statistics.observe(activation, axis)
