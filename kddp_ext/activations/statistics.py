"""Statistics of a layer's neurons for pruning, summed while the loss reads the activations, and their latest values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kddp_ext import ops
from kddp_ext.activations.layout import Layout, NeuronMatrix, as_matrix

# The rows of a statistics tensor, in the order of the kernels.
STATISTICS = ("sum_abs", "sum", "sum_squares", "nonzero", "max_abs")
_SUMS, _MAX_ABS = slice(0, 4), 4
_BATCHES = 8  # each batch fills at most this part of the ring, so that the ring spans several batches
# Multiples of the golden ratio are spread evenly over samples and positions for every size (Weyl).
_GOLDEN = 0.6180339887498949


class NeuronStatistics:
    """Running sums over the activations of one layer, with one entry for each neuron.

    All sums are float64. Sums over many batches must neither lose the small activations of a nearly dead neuron nor
    turn the variance of a constant neuron into rounding noise.

    Args:
        width: number of neurons H.
        device: device of the sums. Default: that of the activations.
        positions: number of entries of each neuron in a sample, if Σa is needed for each of them. Default None.
        samples: number of latest values of each neuron to store. Default 0.

    Attributes:
        values: (5, H) float64, the rows named by `STATISTICS`.
        position_sums: (H, positions) float64, Σa of each entry of a neuron; None without `positions`.
        ring: the latest values; None without `samples`.
        rows: number of values of each neuron that were summed: samples times positions.
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
        with torch.inference_mode(False):  # later updates may happen outside inference mode
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
        return self.sum / (self.rows or torch.nan)

    @property
    def position_mean(self) -> Tensor:
        """Mean of each entry of a neuron, (H, positions), or (H, 1) without positions; NaN before any sample."""
        if self.position_sums is None:
            return self.mean[:, None]
        return self.position_sums * self.position_sums.shape[1] / (self.rows or torch.nan)

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute activation, (H,); NaN before any sample."""
        return self.sum_abs / (self.rows or torch.nan)

    @property
    def std(self) -> Tensor:
        """Standard deviation over the samples (dividing by their number), (H,); NaN before any sample.

        With `positions`, each entry of a neuron varies about its own mean.
        """
        mean_square = self.sum_squares / (self.rows or torch.nan)
        variance = mean_square - self.position_mean.square().mean(1)
        # The variance of a constant neuron is a difference of two equal numbers; its rounding noise counts as 0.
        noise = mean_square * 1e-14
        return torch.where(variance > noise, variance, variance * 0).sqrt()

    @property
    def active_fraction(self) -> Tensor:
        """Fraction of the samples in which the neuron was not exactly zero, (H,); NaN before any sample."""
        return self.nonzero / (self.rows or torch.nan)

    def update(self, sums: Tensor, matrix: NeuronMatrix) -> None:
        """Add `sums`, (5, columns) float64, which the kernels computed from `matrix`."""
        updates = _Updates()
        updates.collect(self, sums, matrix)
        updates.make()

    def matrix(self, activation: Tensor, axis: int = 1) -> NeuronMatrix:
        """`activation`, with the neurons along `axis`, as the matrix whose sums `update` takes."""
        return as_matrix(activation, axis, keep_positions=self.position_sums is not None)

    def observe(self, activation: Tensor, axis: int = 1) -> None:
        """Add the samples of `activation` without computing a loss.

        Args:
            activation: at least 2 dimensions; float32, float64, bfloat16 or float16.
            axis: the dimension of the H neurons, counted from the last if negative. All others are samples and
                positions.

        Raises:
            TypeError, ValueError: the dtype or shape is not as described; nothing is added.
        """
        matrix = self._checked_matrix(activation, axis)
        self.update(ops.neuron_statistics(matrix.values), matrix)

    def _checked_matrix(self, activation: Tensor, axis: int) -> NeuronMatrix:
        """The matrix of an activation without its graph, with the errors of `observe`."""
        if activation.dtype not in ops.ELEMENT_TYPES:
            raise TypeError(f"activation: expected dtype float32, float64, bfloat16 or float16, got {activation.dtype}")
        dimensions = activation.dim()
        if dimensions < 2 or not -dimensions <= axis < dimensions or activation.shape[axis] != self.width:
            raise ValueError(
                f"activation: expected at least 2 dimensions, and {self.width} neurons along dimension {axis}, got "
                f"shape {tuple(activation.shape)}"
            )
        return self.matrix(activation.detach(), axis)

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        """Move the sums to `device`."""
        if self.values.device != device:
            self.values = self.values.to(device)
            if self.position_sums is not None:
                self.position_sums = self.position_sums.to(device)
            if self.ring is not None:
                self.ring.to(device)

    def reset(self) -> None:
        """Remove all samples."""
        self.values.zero_()
        if self.position_sums is not None:
            self.position_sums.zero_()
        if self.ring is not None:
            self.ring.reset()
        self.rows = 0

    @classmethod
    def joined(cls, parts: Sequence[NeuronStatistics]) -> NeuronStatistics:
        """The statistics of the samples of all `parts`, in their order, for the same neurons on one device."""
        joined = copy.deepcopy(parts[0])
        for part in parts[1:]:
            joined.values[_SUMS].add_(part.values[_SUMS])
            joined.max_abs.clamp_(min=part.max_abs)
            if joined.position_sums is not None and part.position_sums is not None:
                joined.position_sums += part.position_sums
            joined.rows += part.rows
        rings = [part.ring for part in parts if part.ring is not None]
        if joined.ring is not None:
            entries = [ring.entries[: ring.filled] for ring in rings]
            joined.ring.fill(torch.cat([ring.samples for ring in rings]), torch.cat(entries))
        return joined

    def select(self, keep: Tensor) -> NeuronStatistics:
        """The sums of the neurons `keep`, (K,) int64, in that order, without the latest values."""
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
        """Restore the result of `state_dict`.

        Raises:
            ValueError: the state has another width or other positions; nothing is changed.
        """
        values, rows = state["values"], int(state["rows"])
        if values.shape != self.values.shape:
            raise ValueError(
                f"state: expected statistics of {self.width} neurons, got a tensor of shape {tuple(values.shape)}"
            )
        sums = state.get("position_sums")
        shapes = [None if each is None else tuple(each.shape) for each in (self.position_sums, sums)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"state: expected position_sums of shape {shapes[0]}, got {shapes[1]}")
        if self.ring is not None and "ring" in state:
            self.ring.load_state_dict(state["ring"])
        elif self.ring is not None:  # the state has no samples
            self.ring.reset()
        if sums is not None and self.position_sums is not None:
            self.position_sums.copy_(sums)
        self.values.copy_(values)
        self.rows = rows


def position_means(statistics: Sequence[NeuronStatistics]) -> list[Tensor]:
    """The `position_mean` of each, computed together; all have samples."""
    sums = [each.sum[:, None] if each.position_sums is None else each.position_sums for each in statistics]
    if not sums:
        return []
    products = torch._foreach_mul(sums, [float(each.shape[1]) for each in sums])
    return list(torch._foreach_div(products, [float(each.rows) for each in statistics]))


_Pairs = list[tuple[Tensor, Tensor]]
"""Targets and sources of an operation in place on many tensors."""


class _Updates:
    """What the layers of a pass add to their statistics. Each kind of update is one operation for all layers.

    On a GPU that is one launch for about a hundred tensors, if each is contiguous: the rows of a layer's sums are, the
    sums together are not.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._places: dict[tuple[object, ...], Tensor] = {}
        self._begin()

    def _begin(self) -> None:
        self._sums, self._largest, self.samples, self.entries = (_Pairs() for _ in range(4))

    def collect(self, statistics: NeuronStatistics, sums: Tensor, matrix: NeuronMatrix) -> None:
        """Add `sums`, (5, columns) float64, which the kernels computed from `matrix`."""
        outer, inner = matrix.layout.outer, matrix.layout.inner
        if sums.shape != (len(STATISTICS), outer * statistics.width * inner):
            raise ValueError(
                f"sums: expected shape {(len(STATISTICS), outer * statistics.width * inner)} (statistics, entries of "
                f"neurons), got {tuple(sums.shape)}"
            )
        if id(statistics) in self._known:  # a layer that is called twice; an operation may take a tensor once
            self.make()
            self._begin()
        self._known.add(id(statistics))
        totals, largest = sums[_SUMS], sums[_MAX_ABS]
        if outer * inner > 1:
            entries = sums.unflatten(1, (outer, statistics.width, inner))
            totals, largest = entries[_SUMS].sum((1, 3)), entries[_MAX_ABS].amax((0, 2))
            if statistics.position_sums is not None:
                self._sums.append((statistics.position_sums, entries[1].movedim(1, 0).flatten(1).contiguous()))
        elif statistics.position_sums is not None:
            statistics.position_sums += totals[1][:, None]
        if statistics.ring is not None:
            statistics.ring.add(matrix, self)
        if totals.is_cuda and not totals.is_contiguous():
            self._sums += zip(statistics.values[_SUMS].unbind(), totals.unbind(), strict=True)
        else:
            self._sums.append((statistics.values[_SUMS], totals))
        self._largest.append((statistics.max_abs, largest))
        statistics.rows += matrix.samples

    def make(self) -> None:
        """Make the updates that were collected."""
        for operation, pairs in (
            (torch._foreach_add_, self._sums),
            (torch._foreach_maximum_, self._largest),
            (torch._foreach_copy_, self.samples),
            (torch._foreach_copy_, self.entries),
        ):
            if pairs:
                operation([target for target, _ in pairs], [source for _, source in pairs])

    def place(self, key: tuple[object, ...], compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute`, which layers with the same `key` share."""
        if key not in self._places:
            self._places[key] = compute()
        return self._places[key]

    def row_and_entry(self, sample: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        """The rows of samples where each row has this many, and which of its row's each sample is."""
        row = self.place((id(sample), entries, "row"), lambda: sample // entries)
        return row, self.place((id(sample), entries, "entry"), lambda: sample % entries)


class SampleRing:
    """Up to `capacity` samples of H neurons; new samples replace the oldest.

    Args:
        capacity: at least 1.
        width: number of neurons H.
        device: where the samples are stored.

    Attributes:
        values: (capacity, H) float32; the first `filled` rows contain samples.
        entries: (capacity,) int64, which of the neurons' entries each sample is; 0 where a neuron has one.
        taken: number of samples added so far.
    """

    def __init__(self, capacity: int, width: int, device: torch.device | str | None = None) -> None:
        with torch.inference_mode(False):  # later writes may happen outside inference mode
            self.values = torch.zeros(capacity, width, dtype=torch.float32, device=device)
            self.entries = torch.zeros(capacity, dtype=torch.int64, device=device)
            self._numbers = torch.arange(-(-capacity // _BATCHES), dtype=torch.float64, device=device)
        self.taken = 0

    @property
    def filled(self) -> int:
        """Number of samples in the ring."""
        return min(self.taken, self.values.shape[0])

    @property
    def samples(self) -> Tensor:
        """(filled, H) float32, in no particular order."""
        return self.values[: self.filled]

    def add(self, matrix: NeuronMatrix, updates: _Updates) -> None:
        """Add some samples of `matrix`, spread evenly over it, to `updates`. The next call takes other positions.

        Rings of the same capacity take the same ones.
        """
        capacity, count = self.values.shape[0], min(matrix.samples, self._numbers.shape[0])
        if count == 0:
            return
        start, values = self.taken % capacity, matrix.values.detach()
        sample = updates.place(
            (values.device, capacity, self.taken, matrix.samples),
            lambda: ((self._numbers[:count] + self.taken) * _GOLDEN % 1 * matrix.samples).long(),
        )
        self._store(updates.samples, self.values, self._picked(values, matrix.layout, sample, updates).float(), start)
        if matrix.layout.entries > 1:
            self._store(updates.entries, self.entries, updates.row_and_entry(sample, matrix.layout.entries)[1], start)
        self.taken += count

    def _picked(self, values: Tensor, layout: Layout, sample: Tensor, updates: _Updates) -> Tensor:
        """The (count, H) activations of some samples, which are numbered by row, then by entry."""
        if layout.entries == 1:
            return values[sample]
        row, entry = updates.row_and_entry(sample, layout.entries)
        entries: Tensor = values.unflatten(1, (layout.outer, -1, layout.inner))
        if layout.outer == 1:
            return entries[row, 0, :, entry]
        if layout.inner == 1:
            return entries[row, entry, :, 0]
        return entries[row, entry // layout.inner, :, entry % layout.inner]

    @staticmethod
    def _store(copies: _Pairs, target: Tensor, source: Tensor, start: int) -> None:
        """Collect the copies of `source` to the rows of `target` from `start` on, and behind its end from 0 on."""
        count, end = source.shape[0], target.shape[0]
        if start + count <= end:
            copies.append((target[start : start + count], source))
        else:
            copies.append((target[start:], source[: end - start]))
            copies.append((target[: start + count - end], source[end - start :]))

    def to(self, device: torch.device) -> None:
        """Move the samples to `device`."""
        self.values, self.entries = self.values.to(device), self.entries.to(device)
        self._numbers = self._numbers.to(device)

    def fill(self, samples: Tensor, entries: Tensor) -> None:
        """Replace the content by `samples`, (S, H), of `entries`, (S,); if they are too many, by evenly spread ones."""
        count = min(len(samples), self.values.shape[0])
        chosen = torch.arange(count, device=samples.device) * len(samples) // max(count, 1)
        self.values[:count], self.entries[:count] = samples[chosen], entries[chosen]
        self.taken = count

    def reset(self) -> None:
        """Remove all samples."""
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        """A copy that `load_state_dict` restores exactly."""
        entries = self.entries[: self.filled].clone()
        return {"values": self.samples.clone(), "entries": entries, "taken": self.taken}

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
        self.entries[: len(values)] = state["entries"].to(self.entries)
        self.taken = taken


class StepObserver(Protocol):
    """What a pruner measures of a training step besides the activations."""

    def of_statistics(self) -> None:
        """The statistics of the step are complete."""

    def of_loss(self, loss: Tensor, mean: Tensor, per_sample: float) -> None:
        """The step's loss, its mean over samples without the penalty, and what makes it the mean over samples."""


class TrackedActivations(tuple[Tensor, ...]):
    """The penalised activations of one forward pass, with the statistics to update.

    It is a tuple of tensors. `fused_kd_l1_loss` updates `statistics` in the pass that computes the penalty, but only if
    gradients are enabled, so that validation does not change them.

    Attributes:
        statistics: one for each tensor.
        axes: the dimension of the neurons in each tensor. Default 1. All others are samples and positions.
        observer: an object that is called when the statistics are complete, and with the loss. Default None.
    """

    statistics: tuple[NeuronStatistics, ...]
    axes: tuple[int, ...]
    observer: StepObserver | None

    def __new__(
        cls,
        tensors: Iterable[Tensor],
        statistics: Sequence[NeuronStatistics],
        axes: Sequence[int] | None = None,
        observer: StepObserver | None = None,
    ) -> TrackedActivations:
        self = super().__new__(cls, tensors)
        self.statistics = tuple(statistics)
        self.axes = (1,) * len(self) if axes is None else tuple(axes)
        self.observer = observer
        for name, given in (("statistics", self.statistics), ("axes", self.axes)):
            if len(self) != len(given):
                raise ValueError(f"{name}: expected one for each of {len(self)} activations, got {len(given)}")
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        """The arguments of `__new__` for copies and pickles."""
        return tuple(self), self.statistics, self.axes

    def matrices(self) -> list[NeuronMatrix]:
        """Each activation as the matrix whose sums its statistics take."""
        return [
            statistics.matrix(activation, axis)
            for activation, statistics, axis in zip(self, self.statistics, self.axes, strict=True)
        ]

    def update(self, matrices: Sequence[NeuronMatrix], sums: Tensor) -> None:
        """Add `sums`, (5, columns of all) float64, which the kernels computed from `matrices`."""
        self._update(matrices, sums.split([matrix.values.shape[1] for matrix in matrices], 1))

    def _update(self, matrices: Sequence[NeuronMatrix], of_layers: Sequence[Tensor]) -> None:
        updates = _Updates()
        for statistics, sums, matrix in zip(self.statistics, of_layers, matrices, strict=True):
            updates.collect(statistics, sums, matrix)
        updates.make()
        if self.observer is not None:
            self.observer.of_statistics()

    def observe(self, loss: Tensor | None = None, mean: Tensor | None = None) -> None:
        """Update the statistics without computing a loss.

        Args:
            loss: your own loss of this step, if you do not use `fused_kd_l1_loss`: the mean over the samples, 0-dim, of
                which `backward` is called. A pruner with a `loss_budget` needs it; and with it, the scale of GradScaler
                or of an accumulation step does not change the saliency. Default None.
            mean: the value that a `loss_budget` refers to, 0-dim, where that is not the value of `loss`, as with
                `fisher_loss`. Default None: the loss.
        """
        matrices = [
            statistics._checked_matrix(activation, axis)
            for activation, statistics, axis in zip(self, self.statistics, self.axes, strict=True)
        ]
        self._update(matrices, [ops.neuron_statistics(matrix.values) for matrix in matrices])
        if loss is not None:
            self.record(loss, loss if mean is None else mean, 1.0)

    def record(self, loss: Tensor, mean: Tensor, per_sample: float) -> None:
        """Tell the observer the step's loss, as `StepObserver.of_loss` describes it."""
        if self.observer is not None and not torch.compiler.is_compiling():
            self.observer.of_loss(loss, mean, per_sample)
