"""DynamicPruner: observes a student's neurons while it trains, and removes those that do nothing."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

from kddp_ext.activations.statistics import NeuronStatistics, TrackedActivations
from kddp_ext.pruning.budget import ModelSize
from kddp_ext.pruning.compaction import CompactionPlan, plan_compaction
from kddp_ext.pruning.copies import checked_copies, unwrapped
from kddp_ext.pruning.criteria import Criterion
from kddp_ext.pruning.distributed import require_rewrappable, rewrap, wrappers_of
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.hooks import Taps
from kddp_ext.pruning.observation import LayerObservation
from kddp_ext.pruning.preview import Preview
from kddp_ext.pruning.ranks import Confirmation, Ranks, observe_together, plan_together
from kddp_ext.pruning.report import PruneReport
from kddp_ext.pruning.schedule import Schedule
from kddp_ext.pruning.selection import LayerDecision, decide
from kddp_ext.pruning.settings import PruningSettings
from kddp_ext.pruning.state import PrunerState
from kddp_ext.pruning.tracing.find import find_neurons
from kddp_ext.pruning.validation import check_model, checked_optimizers, choose_layers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


class DynamicPruner:
    """Finds the inactive neurons of a model's hidden Linear layers while it trains, and removes them.

    Pass `activations` to `kddp_ext.fused_kd_l1_loss` at every step, and call `prune()` every so often (once
    an epoch, say). `prune()` makes the layers physically smaller, with their gradients and the optimizer's
    state; parameters keep their identity, so the training loop goes on unchanged. A copy of a pruner (copy.deepcopy,
    pickle) is closed: make a new one for a copied model.

    Args:
        model: the student, also inside of torch.compile or DistributedDataParallel, which is brought in line after
            a prune. Its layers are found by tracing; nothing of it is changed but for forward hooks.
        optimizer: the optimizer whose state is sliced along, or a list where several train the model; None where
            there is none.
        example_inputs: positional arguments for the model's forward, as a tuple; two samples are enough.
        criterion: "contribution" (default: what varies in the next layer because of the neuron; blind neither
            to constant neurons nor to rescaling between layers), "mean_activation", "apoz" or "dead"; or a
            function `f(statistics: NeuronStatistics, outgoing: Tensor) -> Tensor` of a layer's H neurons, where
            `outgoing` is ‖W2[:,j]‖₂ of the weights that read each, (H,) float64, and the result their
            activities, (H,), finite and not negative. It must depend on nothing else.
        threshold: a neuron is inactive at a check when its activity is below this, in (0, 1]. Relative to the
            layer's most active neuron for "contribution" and "mean_activation", a share of the samples for
            "apoz", unused by "dead", any positive number for a function. Default 0.01.
        patience: a neuron is removed when it was inactive at so many checks in a row. Default 2, so that one
            unlucky interval removes nothing.
        minimum_width: no layer gets narrower than this. Default 1.
        round_to: widths are rounded up to a multiple of this by keeping the most active of the neurons to be
            removed. Default 1; 8 or 16 suit matrix units.
        maximum_share: at most this share of a layer's present neurons goes in one prune, the least active
            first, in (0, 1]; rounded down, so nothing goes of a layer where it is less than one neuron.
            Default 1.0: all that are due.
        target_parameters: once the model has so few parameters, nothing more goes; a prune that gets there
            removes only the least active neurons of all layers that it takes. Default None: no such bound.
        target_macs: the same for multiply-accumulates of one sample. With both, pruning stops when both hold.
        compensate: add what removed neurons contributed on average to the next layer's bias (or, where it has
            none and a BatchNorm follows, to that). Default True.
        reconstruction_samples: how many of the latest values of each layer are kept, from which what varied in the
            removed neurons is expressed through those that stay and added to their weights in the next layer
            (ridge regression). Default 256: a few batches' worth. 0 compensates the average alone.
        layers: names of the layers to prune; by default all that can be.
        copies: modules of the model's structure that are pruned with it, such as a moving average of its
            weights (torch.optim.swa_utils.AveragedModel, or a plain copy). Default: none.
        process_group: the processes that prune together, each with its share of the samples: all must call
            `prune()`. Default None: those of the model's DistributedDataParallel, else all of
            torch.distributed, where it is initialised. False: this process prunes by itself.
        interval: `step()` prunes at every so many calls. Default None: only `prune()` does.
        start: `step()` does not prune before so many calls. What was seen in the intervals before is not
            judged. Default 0.
        l1_weight: what the property `l1_weight` rises to, for the loss. Default 0.0.
        l1_warmup: over how many calls of `step()` it rises. Default 0: it is there at once.

    Attributes:
        settings: the arguments that its decisions depend on. May be replaced between checks:
            `pruner.settings = dataclasses.replace(pruner.settings, threshold=0.02)`. More `reconstruction_samples` are
            kept from the next check on.
        schedule: the arguments that count steps; may be replaced likewise.
        refused: the reason by layer name, for each Linear and convolution that cannot be pruned.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedModelError: (a ValueError) a layer asked for, or every layer, cannot be pruned; the message
            says why for each.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        example_inputs: tuple[Any, ...],
        criterion: str | Criterion = "contribution",
        threshold: float = 0.01,
        patience: int = 2,
        minimum_width: int = 1,
        round_to: int = 1,
        maximum_share: float = 1.0,
        target_parameters: int | None = None,
        target_macs: int | None = None,
        compensate: bool = True,
        reconstruction_samples: int = 256,
        layers: Sequence[str] | None = None,
        copies: Sequence[nn.Module] = (),
        process_group: ProcessGroup | Literal[False] | None = None,
        interval: int | None = None,
        start: int = 0,
        l1_weight: float = 0.0,
        l1_warmup: int = 0,
    ) -> None:
        check_model(model)
        model = unwrapped(model)
        self._optimizers = checked_optimizers(optimizer, model)
        if not isinstance(example_inputs, tuple):
            raise TypeError(
                "example_inputs: expected a tuple of the forward's positional arguments, such as "
                f"(images[:2],), got {type(example_inputs).__name__}"
            )
        self.model = model
        self.optimizer = optimizer
        self._copies = checked_copies(model, copies)
        self._process_group = process_group
        self._ranks("process_group")  # its errors belong here
        self.settings = PruningSettings(
            criterion=criterion,
            threshold=threshold,
            patience=patience,
            minimum_width=minimum_width,
            round_to=round_to,
            maximum_share=maximum_share,
            target_parameters=target_parameters,
            target_macs=target_macs,
            compensate=compensate,
            reconstruction_samples=reconstruction_samples,
        )
        self.schedule = Schedule(interval, start, l1_weight, l1_warmup)

        found = find_neurons(model, example_inputs)
        self.refused = found.refused
        groups = choose_layers(model, found.groups, found.refused, layers)
        self._positions = found.positions
        self._state = PrunerState.fresh(model, groups, samples=self.settings.samples)
        self._taps: Taps | None = Taps(model, groups)
        weakref.finalize(self, self._taps.remove)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or one from a pickle, is closed: the hooks on its model are those of no pruner."""
        return {**self.__dict__, "_taps": None}

    def __repr__(self) -> str:
        widths = ", ".join(f"{name} {width}" for name, width in self.widths.items())
        return f"DynamicPruner({widths}; criterion={self.settings.criterion!r}, threshold={self.settings.threshold})"

    @property
    def widths(self) -> dict[str, int]:
        """Number of neurons by layer, now."""
        return self._state.widths

    @property
    def history(self) -> PruningHistory:
        """What has been pruned since the model's constructor, or since this pruner was made."""
        return self._state.history

    @property
    def statistics(self) -> dict[str, NeuronStatistics]:
        """The sums since the last check, by layer."""
        return dict(zip(self.widths, self._state.statistics, strict=True))

    @property
    def l1_weight(self) -> float:
        """The weight to give the L1 penalty in the loss now: it rises linearly with the calls of `step()`."""
        return self.schedule.l1_weight_after(self._state.steps)

    @property
    def activations(self) -> TrackedActivations:
        """The neurons' values in the latest forward pass, for each layer of `widths`.

        They are what the next layer reads, taken before a Dropout in front of it, and part of the autograd graph:
        (N, H) of a Linear, (..., H) where it is applied along a sequence, (N, C, *positions) of a convolution; their
        `axes` say which dimension the neurons are. Positions count as samples.

        Raises:
            RuntimeError: no forward pass since the pruner was made or last pruned, or the pruner is closed.
        """
        taps = self._open_taps("activations")
        values, axes = [], []
        for group, statistics in zip(self._state.groups, self._state.statistics, strict=True):
            seen = taps.value(group)
            if seen is None:
                raise RuntimeError(
                    f"activations: no forward pass has reached {group.name} since the pruner was made or last "
                    "pruned; call the model first (a compiled model must not have been called before the pruner "
                    "was made)"
                )
            value, axis = seen
            statistics.to(value.device)  # the model may have been moved
            values.append(value)
            axes.append(axis)
        return TrackedActivations(values, self._state.statistics, axes)

    def prune(self) -> PruneReport:
        """Check every layer, and remove the neurons that were inactive at `patience` checks in a row.

        The statistics start afresh afterwards. Where anything fails, the model, the optimizer and the pruner
        are as they were.

        Returns:
            What was done; `print` it.

        Raises:
            RuntimeError: there are no statistics since the last check, or the pruner is closed. Where several
                processes prune together: one of them failed, or differs from the others. Nothing is changed on
                any of them then, and all raise the same error, which names the rank.
            ValueError: a layer's statistics or weights are not finite, or a tensor of the model or the
                optimizer does not have the expected shape.
            TypeError, ValueError: a criterion of your own returned no activities.
        """
        return self._prune(self._state, self._open_taps("prune"))

    def step(self) -> PruneReport | None:
        """Count a training step: call it once after each `optimizer.step()`.

        At every `interval`-th call from `start` on it prunes, as `prune()` does. Where that fails, the step is
        not counted.

        Returns:
            What a prune did; None where it was no step to prune at.
        """
        taps = self._open_taps("step")
        state = replace(self._state, steps=self._state.steps + 1)
        if self.schedule.check_due(state.steps):
            return self._prune(state, taps)
        if self.schedule.interval_ends(state.steps):  # before start: what is judged later is the last interval
            self.reset()
        self._state = state
        return None

    def preview(self, threshold: float | None = None) -> Preview:
        """What a prune now would do if every inactive neuron had been so for long enough; nothing is changed.

        Args:
            threshold: to try instead of the pruner's own.

        Returns:
            The widths, the model's size and the predicted change of the outputs; `print` it.

        Raises:
            RuntimeError, ValueError: as of `prune`.
        """
        self._open_taps("preview")
        tried = self.settings.threshold if threshold is None else threshold
        settings = replace(self.settings, threshold=tried, patience=1)
        size = ModelSize(self.model, self._state.groups, self._positions)
        decisions = decide(self._state.observe(self.model, caller="preview"), settings, size)
        return Preview.of(decisions, size, settings.threshold)

    def reset(self) -> None:
        """Forget the statistics since the last check."""
        for statistics in self._state.statistics:
            statistics.reset()

    def close(self) -> None:
        """Take the hooks off the model. The history stays readable."""
        if self._taps is not None:
            self._taps.remove()
        self._taps = None

    def state_dict(self) -> dict[str, Any]:
        """Statistics, patience counters, steps, first scales and history, as plain tensors, numbers and strings.

        To resume, rebuild the model with `PruningHistory.from_json(state["history"]).replay(...)`, make
        optimizer and pruner for it, and load their states.
        """
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, for a model of the same widths.

        Raises:
            ValueError: the state is of another version, of other layers or of other widths. Nothing is
                changed then.
        """
        self._state = self._state.restored(state)

    def _prune(self, state: PrunerState, taps: Taps) -> PruneReport:
        ranks, wrappers = self._ranks("prune")
        observe = partial(state.observe, self.model, caller="prune")
        observations = observe_together(  # 1. the statistics are complete
            ranks, observe, model=self.model, settings=self.settings, steps=state.steps
        )
        plan = partial(self._plan, observations, state, wrappers)
        _, (compaction, new_state, report) = plan_together(ranks, plan)  # 2. nothing is changed yet
        refresh = [partial(rewrap, wrapper) for wrapper in wrappers if report.neurons_pruned]
        with Confirmation(ranks) as confirmation:  # 3. all of it, or nothing
            compaction.apply([(self, "_state", new_state)], refresh=refresh, confirm=confirmation.done)
        taps.clear()
        return report

    def _plan(
        self,
        observations: Sequence[LayerObservation],
        state: PrunerState,
        wrappers: Sequence[DistributedDataParallel],
    ) -> tuple[Sequence[LayerDecision], tuple[CompactionPlan, PrunerState, PruneReport]]:
        size = ModelSize(self.model, state.groups, self._positions)
        decisions = decide(observations, self.settings, size)  # a function of its arguments alone
        removals = [decision.removal for decision in decisions if decision.pruned.numel()]
        for wrapper in wrappers:
            require_rewrappable(wrapper)
        checked_copies(self.model, self._copies)
        compaction = plan_compaction(self.model, removals, self._optimizers, self._copies)
        return decisions, (compaction, state.after(decisions, self.settings.samples), PruneReport.of(decisions, size))

    def _ranks(self, caller: str) -> tuple[Ranks, Sequence[DistributedDataParallel]]:
        """The processes that prune together now, and the wrappers to be brought in line."""
        wrappers = wrappers_of([self.model, *self._copies])
        return Ranks.of(self._process_group, wrappers, caller=caller), wrappers

    def _open_taps(self, caller: str) -> Taps:
        if self._taps is None:
            raise RuntimeError(f"{caller}: the pruner is closed, as every copy of one is")
        return self._taps
