"""What the removal of each neuron costs the loss, from the gradients of the training's own backward passes.

Replacing neuron j by its mean ā_j changes the loss of a sample by about -Σ_positions (a_j - ā_j) ∂loss/∂a_j. Near a
minimum these changes cancel over the samples, and the mean of their squares, halved, is the Fisher approximation of the
increase of the loss (Theis et al. 2018, arXiv:1801.05787, equation 7; Molchanov et al. 2017, arXiv:1611.06440).

A neuron that several layers read changes the inputs of all of them, so its products are added before squaring. Each
layer's input is passed through an identity whose backward reads the activation and its gradient once, and keeps one
product for each sample and neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kddp_ext import ops
from kddp_ext.activations.layout import Layout
from kddp_ext.activations.statistics import NeuronStatistics, position_means
from kddp_ext.pruning.hooks import Hook, is_fake
from kddp_ext.pruning.tracing.recording import first_argument
from kddp_ext.pruning.tracing.structure import PrunableNeurons

_MOST_PENDING = 8  # passes that may wait for their backward at the same time


class Saliency:
    """The sums of the measured samples since the last check, for all N neurons of a model.

    Attributes:
        squares: (N,) float64, Σ over samples of (Σ over readers and positions of (a - ā) ∂loss/∂a)², where loss is
            that of the sample.
        samples: number of measured samples, 0-dim float64.
        loss: sum over the steps of the mean loss of a sample, without the penalty, 0-dim float64.
        steps: number of these steps, 0-dim float64.
    """

    def __init__(self, number: int, device: torch.device | str | None = "cpu") -> None:
        with torch.inference_mode(False):
            self.squares = torch.zeros(number, dtype=torch.float64, device=device)
            self.samples, self.loss, self.steps = torch.zeros(3, dtype=torch.float64, device=device).unbind()

    @property
    def increase(self) -> Tensor:
        """(N,) float64: the predicted increase of the mean loss if the neuron is replaced by its mean."""
        return self.squares / (2 * self.samples)

    @property
    def mean_loss(self) -> float | None:
        """The mean loss of a sample since the last check; None where no loss was seen."""
        return float(self.loss / self.steps) if self.steps > 0 else None

    def add_products(self, products: Tensor, scale: Tensor | float) -> None:
        """Add one pass.

        Args:
            products: (samples, N). A pass with a product that is not finite is left out, as GradScaler leaves out such
                a step.
            scale: what makes them the products of a sample's own loss.
        """
        self._to(products.device)
        squares = (products.double() * scale).square_().sum(0)
        finite = squares.amax() < torch.inf
        self.squares += torch.where(finite, squares, 0.0)
        self.samples.add_(finite, alpha=len(products))

    def add_loss(self, loss: Tensor) -> None:
        """Add the mean loss of one step, 0-dim."""
        self._to(loss.device)
        self.loss += loss
        self.steps += 1

    def reset(self) -> None:
        """Remove all samples."""
        for value in vars(self).values():
            value.zero_()

    def _to(self, device: torch.device) -> None:
        if self.squares.device != device:
            for name, value in vars(self).items():
                setattr(self, name, value.to(device))

    def on_cpu(self) -> Saliency:
        """A copy on the CPU."""
        copied = Saliency(0)
        for name, value in vars(self).items():
            setattr(copied, name, value.to("cpu", copy=True))
        return copied

    @classmethod
    def joined(cls, parts: Sequence[Saliency]) -> Saliency:
        """The sums over all `parts`, in their order, for the same neurons on one device."""
        joined = parts[0].on_cpu()
        for part in parts[1:]:
            for name, value in vars(part).items():
                setattr(joined, name, getattr(joined, name) + value)
        return joined

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the sums that `restored` takes."""
        return {name: value.clone() for name, value in vars(self).items()}

    def restored(self, state: Any) -> Saliency:
        """The sums that `state_dict` returned, for the same neurons."""
        restored = self.on_cpu()
        for name, value in vars(restored).items():
            saved = state.get(name) if isinstance(state, dict) else None
            if not isinstance(saved, Tensor) or saved.shape != value.shape:
                got = tuple(saved.shape) if isinstance(saved, Tensor) else saved
                raise ValueError(f"state: expected saliency[{name!r}] of shape {tuple(value.shape)}, got {got}")
            value.copy_(saved)
        return restored


@dataclass
class _Pass:
    """One forward pass.

    `leaves` receive the products as their gradients: one of (samples, width) for each group. `means` are those that are
    taken out, for each tap.
    """

    samples: int
    leaves: list[Tensor]
    means: list[Tensor | None] = field(default_factory=list)
    is_read: bool = False  # a layer has read its input already
    is_broken: bool = False  # the numbers of rows do not fit each other
    per_sample: float = 1.0  # times the loss that is differentiated, is the mean loss of a sample
    seeds: list[Tensor] = field(default_factory=list)  # the gradient that each backward pass starts from

    @property
    def is_measured(self) -> bool:
        return not self.is_broken and any(leaf.grad is not None for leaf in self.leaves)

    def add_to(self, sums: Saliency) -> None:
        """Add the products to `sums`."""
        products = torch.cat([torch.zeros_like(e) if e.grad is None else e.grad for e in self.leaves], 1)
        seed = (self.seeds[0] if len(self.seeds) == 1 else torch.stack(self.seeds).sum()) if self.seeds else 1.0
        sums.add_products(products, self.samples * self.per_sample / seed)


class GradientTaps:
    """The identities of one pruner, in front of every layer that reads neurons.

    Attributes:
        sums: to which each measured pass is added once a later pass begins.
    """

    def __init__(self, model: nn.Module, neurons: PrunableNeurons, sums: Saliency) -> None:
        self.taps: list[_Tap] = []
        self._handles = []
        places = dict.fromkeys((reader.module, reader.value) for reader in neurons.readers)
        for index, (module, value) in enumerate(places):
            tap = _Tap(self, index, module, value)
            self.taps.append(tap)
            reader = model.get_submodule(module)
            self._handles.append(reader.register_forward_pre_hook(tap, with_kwargs=True))
        self.reset(self.places(neurons), sums)

    def places(self, neurons: PrunableNeurons) -> _Places:
        """Where these neurons lie in what the layers read."""
        widths = [group.width for group in neurons.groups]
        rows = [value.rows for value in neurons.values]
        return _Places(widths, rows, [tap.place(neurons) for tap in self.taps])

    def reset(self, places: _Places, sums: Saliency) -> None:
        """Forget all passes, for a model whose neurons lie in these `places` now. It allocates nothing."""
        self.sums = sums
        self._widths = places.widths
        self._statistics: Sequence[NeuronStatistics] = ()
        self._compensate, self._samples = True, 0
        self._means: list[Tensor | None] | None = None  # of the next pass; None: it is not measured
        self._pending: list[_Pass] = []
        self.current = self.latest = _Pass(0, [])
        for tap, place in zip(self.taps, places.of_taps, strict=True):
            tap.reset(place)
        self._note_rows(places.rows)

    def end_pass(self, values: Sequence[Tensor], statistics: Sequence[NeuronStatistics], *, compensate: bool) -> None:
        """End the present pass, which has read `values`. The next is measured once the statistics are complete."""
        self.finish()
        self.latest = self.current
        if self.latest.leaves:
            self._pending = [*self._pending, self.latest][-_MOST_PENDING:]
        self._samples = self._note_rows([len(value) for value in values])
        self._like = torch.float64 if values[0].dtype == torch.float64 else torch.float32, values[0].device
        self._statistics, self._compensate, self._means = statistics, compensate, None
        self._set(_Pass(0, []))

    def _note_rows(self, rows: Sequence[int]) -> int:
        """Note how many rows of each sample a layer reads, such as its windows; returns the number of samples."""
        samples = min(rows)
        for tap in self.taps:
            own = rows[tap.value]
            tap.rows = own // samples if samples and own % samples == 0 else 0
        return samples

    def of_statistics(self) -> None:
        """Prepare the next pass."""
        if not torch.compiler.is_compiling():
            self.prepare(self._statistics, compensate=self._compensate)
            if self._samples:  # a compiled model cannot make the leaves
                self.begin(self._samples, *self._like)

    def prepare(self, statistics: Sequence[NeuronStatistics], *, compensate: bool) -> None:
        """The next pass is measured, if these statistics have samples; their means are taken out."""
        self._means = None
        if all(each.rows for each in statistics):
            values = list(dict.fromkeys(tap.value for tap in self.taps if compensate and tap.takes_mean))
            means = dict(zip(values, position_means([statistics[value] for value in values]), strict=True))
            self._means = [tap.mean_in(means[tap.value]) if tap.value in means else None for tap in self.taps]

    def begin(self, samples: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin a pass of this many samples, if it is to be measured."""
        if self._means is not None:
            for tap in self.taps:
                tap.to(device)
            base = torch.empty(1, 1, dtype=dtype, device=device)  # the leaves' values are never read
            self._set(_Pass(samples, [base.expand(samples, w).requires_grad_() for w in self._widths], self._means))

    def _set(self, current: _Pass) -> None:
        self.current = current
        for tap in self.taps:
            tap.set_pass(current)

    def of_loss(self, loss: Tensor, mean: Tensor, per_sample: float) -> None:
        """Note the loss of the pass whose activations were read last.

        Args:
            loss: what the backward pass goes through. The gradient that it receives, such as GradScaler's scale or the
                share of an accumulation step, is divided out.
            mean: the mean loss of a sample, without the penalty.
            per_sample: what makes `loss` the mean loss of a sample.
        """
        self.sums.add_loss(mean.detach())
        self.latest.per_sample = per_sample
        if loss.requires_grad:
            seeds = self.latest.seeds
            loss.register_hook(lambda gradient: seeds.append(gradient.detach().sum()))

    def finish(self) -> None:
        """Add the passes that were measured."""
        for each in self._pending:
            if each.is_measured:
                each.add_to(self.sums)
        self._pending = [each for each in self._pending if not each.is_measured]

    def remove(self) -> None:
        """Remove the identities from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Tap(Hook):
    """The hook in front of a layer. It replaces the layer's input by the output of the identity."""

    def __init__(self, taps: GradientTaps, index: int, module: str, value: int) -> None:
        self._taps, self._index, self.module, self.value = taps, index, module, value

    def place(self, neurons: PrunableNeurons) -> _Place:
        """Where the neurons lie in what the layer reads."""
        value, parts = neurons.values[self.value], []
        readers = [each for each in neurons.readers if (each.module, each.value) == (self.module, self.value)]
        for index, group in enumerate(neurons.groups):
            units, members = neurons.units_of(self.value, group)
            if units.numel():
                parts.append(_Part(index, group.width, units, members))
        return _Place(value.layout, all(each.shift is not None for each in readers), parts)

    def reset(self, place: _Place) -> None:
        self._place = place
        self.rows = 1  # of each sample that the layer reads; 0: they do not fit
        self._leaves: list[Tensor] = []
        self._mean: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Move the indices of the neurons to `device`, so that no backward has to wait for their copies."""
        for part in self._place.parts:
            part.to(device)

    @property
    def takes_mean(self) -> bool:
        """Whether the layer's bias can absorb the mean."""
        return self._place.has_bias

    def mean_in(self, position_mean: Tensor) -> Tensor | None:
        """The mean of each entry; None where the layer's bias cannot absorb it."""
        return self._place.layout.in_order(position_mean) if self.takes_mean else None

    def set_pass(self, current: _Pass) -> None:
        self._leaves, self._mean = self._of(current)

    def _of(self, one: _Pass) -> tuple[list[Tensor], Tensor | None]:
        """The leaves and the mean of a pass; no leaves where it is not measured."""
        if not one.samples:
            return [], None
        return [one.leaves[part.group] for part in self._place.parts], one.means[self._index]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = first_argument(args, kwargs)
        if not self.rows or not torch.is_grad_enabled() or _cannot_tap(value):
            return None
        if not torch.compiler.is_compiling():
            leaves, mean = self._in_eager_mode(value)
        else:
            leaves, mean = self._leaves, self._mean
        if not leaves or len(value) != len(leaves[0]) * self.rows:
            return None
        tapped = _Identity.apply(value, mean, self._place, *leaves)  # type: ignore[no-untyped-call]
        return (
            tuple(tapped if each is value else each for each in args),
            {name: tapped if each is value else each for name, each in kwargs.items()},
        )

    def _in_eager_mode(self, value: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The leaves and the mean for `value`; a batch of another size begins the pass again."""
        taps = self._taps
        if torch._C._current_graph_task_id() != -1:
            return self._of(taps.latest)  # a checkpoint's recomputation belongs to the pass that is differentiated
        if len(value) != taps.current.samples * self.rows:
            if taps.current.is_read or len(value) % self.rows:
                taps.current.is_broken = True
                return [], None
            dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
            taps.begin(len(value) // self.rows, dtype, value.device)
        taps.current.is_read = True
        return self._leaves, self._mean


def _cannot_tap(value: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return is_fake(value) or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


class _Places(NamedTuple):
    """Where the neurons of a model lie: the widths of its groups, the rows of its values, and a place for each tap."""

    widths: list[int]
    rows: list[int]
    of_taps: list[_Place]


class _Place(NamedTuple):
    """Where the neurons lie in what a layer reads; `has_bias`: the layer can absorb a constant."""

    layout: Layout
    has_bias: bool
    parts: list[_Part]


class _Part:
    """The units of a value that belong to one group; `members` is None where they are all its neurons, in order."""

    def __init__(self, group: int, width: int, units: Tensor, members: Tensor) -> None:
        self.group, self.width, self.units = group, width, units
        self.members = None if torch.equal(members, torch.arange(width, device="cpu")) else members

    def to(self, device: torch.device) -> None:
        """Move the indices to `device`."""
        self.units = self.units.to(device)
        self.members = None if self.members is None else self.members.to(device)

    def products(self, of_units: Tensor, number: int) -> Tensor:
        """(samples, width): the products of the group's neurons, from those of all units."""
        own = of_units
        if self.units.numel() != number:
            own = of_units.index_select(1, self.units.to(of_units.device))
        if self.members is None:
            return own
        result = of_units.new_zeros(len(of_units), self.width)
        return result.index_add_(1, self.members.to(of_units.device), own)


class _Identity(torch.autograd.Function):
    """Returns its input. The backward gives each leaf the products of its group's neurons as gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mean: Tensor | None, place: _Place, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(value, mean)
        ctx.place, ctx.samples = place, len(leaves[0])
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        value, mean = ctx.saved_tensors
        place: _Place = ctx.place
        layout = place.layout
        products = ops.gradient_products(value.detach(), gradient.detach(), mean, axis=layout.axis, samples=ctx.samples)
        if layout.entries > 1:
            products = products.unflatten(1, (layout.outer, -1, layout.inner)).sum((1, 3))
        number = products.shape[1]
        return gradient, None, None, *(part.products(products, number) for part in place.parts)
