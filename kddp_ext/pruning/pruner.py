"""DynamicPruner: observes the neurons of a student while it trains, and removes those that do nothing."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kddp_ext.activations.statistics import NeuronStatistics, TrackedActivations
from kddp_ext.pruning.compaction import (
    CompactionPlan,
    Removal,
    assign,
    checked_copies,
    plan_compaction,
    units_gone,
    with_inner_optimizers,
)
from kddp_ext.pruning.distributed import (
    Ranks,
    from_rank_0,
    gather,
    on_each_rank,
    require_rewrappable,
    rewrap,
    wrappers_of,
)
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.hooks import ActivationHooks
from kddp_ext.pruning.model_size import ModelSize
from kddp_ext.pruning.ranking import Resource, saving
from kddp_ext.pruning.reconstruction import Reconstruction, reconstruct
from kddp_ext.pruning.report import Preview, PruneReport
from kddp_ext.pruning.saliency import GradientTaps
from kddp_ext.pruning.selection import Decision, Observation, curve, decide
from kddp_ext.pruning.settings import Criterion, PruningSettings, Schedule, Streams, check_streams
from kddp_ext.pruning.state import PrunerState
from kddp_ext.pruning.tracing.find import TracedNeurons, find_neurons
from kddp_ext.pruning.tracing.recording import TracedModules, UnsupportedModelError, check_example_inputs, unwrapped
from kddp_ext.pruning.tracing.structure import PrunableNeurons

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


class DynamicPruner:
    """Finds the inactive neurons of a model's hidden layers while it trains, and removes them.

    Pass `activations` to `kddp_ext.fused_kd_l1_loss` at every step, and call `prune()` regularly, for example once an
    epoch. `prune()` makes the layers physically smaller, together with their gradients and the optimizer's state. All
    parameters keep their identity, so the training loop needs no change. A copy of a pruner (copy.deepcopy, pickle) is
    closed; make a new pruner for a copied model.

    Args:
        model: the student. It may be wrapped in torch.compile or DistributedDataParallel; a wrapper is updated after
            each prune. The prunable layers are found by tracing. Nothing is added to the model except hooks.
        optimizer: the optimizer whose state is sliced with the parameters, a list where several optimizers train the
            model, or None.
        example_inputs: positional arguments for the model's forward, as a tuple; a batch of two samples is enough.
        criterion: how active a neuron is. "contribution" (default) measures how much the next layer's input varies with
            the neuron; it ignores constant neurons and is invariant to rescaling between layers. "saliency" predicts
            the increase of the loss without the neuron from the gradients of the training, and is the one that compares
            neurons of different layers; it needs neither `threshold` nor `patience`. Where removed neurons are
            reconstructed, the increase is that of what the remaining ones cannot express. The others are
            "mean_activation", "apoz", "dead", or a `kddp_ext.Criterion`, a function that depends on its arguments only.
        threshold: a neuron is inactive at a check when its activity is below this, in (0, 1]. It is relative to the
            layer's most active neuron for "contribution" and "mean_activation", a share of the samples for "apoz",
            unused by "dead", and any positive number for a function. Default 0.01.
        patience: a neuron is removed when it was inactive at this many consecutive checks. Default 2, so that a single
            unusual interval removes nothing.
        minimum_width: no layer becomes narrower than this. Default 1.
        round_to: widths are rounded up to a multiple of this; the most active of the neurons to be removed are kept.
            Default 1. 8 or 16 suit matrix units.
        maximum_share: at most this share of a layer's present neurons is removed by one prune, the least active first,
            in (0, 1]. The number is rounded down, so nothing is removed where it is less than one neuron. Default 1.0:
            no limit.
        target_parameters: no neurons are removed once the model has at most this many parameters, or, as a float of at
            most 1, this share of the parameters that it has now. The prune that gets there removes only as many neurons
            as necessary, the least active of all layers. Default None: no target.
        target_macs: the same for the multiply-accumulates of one sample. With both targets, pruning stops when both are
            met.
        target_steps: the number of checks in which the targets are approached; each takes away the same share. Default
            1: the first check may go all the way.
        resource: what a neuron costs: "macs", "parameters", or a function of the widths by layer. Neurons of all layers
            are then ranked by activity for each unit that their removal saves, with the savings at that step. It
            matters where a target or the loss budget decides. Default None: "macs" with "saliency"; the other criteria
            rank by activity alone.
        loss_budget: with "saliency", pruning may raise the loss to at most this share above the lowest that any check
            has seen. A check removes neurons as long as their predicted increases fit into what is left, and nothing
            while the loss is above. So a layer's size is found by itself, and pruning ends when nothing is cheap any
            more. Default None: 0.01 without a target, no limit with one.
        compensate: add the mean contribution of removed neurons to the next layer's bias, or to the BatchNorm behind a
            layer without bias. Default True.
        reconstruction_samples: the number of recent values of each neuron from which a ridge regression expresses
            removed neurons through the remaining ones; the result is added to the next layer's weights. Default 256,
            which are a few batches' worth. 0 compensates only the mean. "saliency" gains from several times the width,
            because it looks at what the samples show of the neurons' correlations.
        layers: names of the layers to prune. A layer that writes the same neurons as others, as in a residual stream,
            stands for all of them. Default: all prunable layers.
        streams: "exact" (default) prunes only what can be removed without changing the other neurons. "all" also
            prunes neurons that a LayerNorm, RMSNorm or GroupNorm normalises together, such as the channels of a
            transformer's residual stream; the norm's statistics are then over fewer neurons, which changes them.
        example_kwargs: keyword arguments for the model's forward, by name. Default: none.
        copies: modules of the model's structure that are pruned with it, such as a moving average of its weights
            (torch.optim.swa_utils.AveragedModel, or a plain copy). Default: none.
        history: what was pruned from the model before, such as the history of a loaded student. The history of this
            pruner continues it; layers that it lacks were not pruned. Default None: nothing.
        process_group: the processes that prune together, each with its share of the samples; all must call `prune()`.
            Default None: those of the model's DistributedDataParallel, or all of torch.distributed where it is
            initialised. False: this process prunes by itself.
        interval: `step()` prunes at every `interval`-th call. Default None: only `prune()` prunes.
        start: `step()` does not prune before this many calls, and discards the statistics of the intervals before.
            Default 0.
        l1_weight: the final value of the property `l1_weight`, for the loss. Default 0.0.
        l1_warmup: the number of calls of `step()` over which `l1_weight` rises linearly from 0. Default 0: no warmup.

    Attributes:
        settings: the arguments that decisions depend on. They may be replaced between checks:
            `pruner.settings = dataclasses.replace(pruner.settings, threshold=0.02)`. A larger `reconstruction_samples`
            takes effect after the next check.
        schedule: the arguments that count steps; they may be replaced too.
        refused: by layer name, the reason why a Linear layer or convolution cannot be pruned.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        UnsupportedModelError: (a ValueError) a requested layer, or every layer, cannot be pruned; the message gives the
            reason for each.
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
        target_parameters: int | float | None = None,
        target_macs: int | float | None = None,
        target_steps: int = 1,
        resource: str | Resource | None = None,
        loss_budget: float | None = None,
        compensate: bool = True,
        reconstruction_samples: int = 256,
        layers: Sequence[str] | None = None,
        streams: Streams = "exact",
        example_kwargs: Mapping[str, Any] | None = None,
        copies: Sequence[nn.Module] = (),
        history: PruningHistory | None = None,
        process_group: ProcessGroup | Literal[False] | None = None,
        interval: int | None = None,
        start: int = 0,
        l1_weight: float = 0.0,
        l1_warmup: int = 0,
    ) -> None:
        model = _checked_model(model)
        self._optimizers = _checked_optimizers(optimizer, model)
        check_example_inputs(example_inputs)
        self.model = model
        self.optimizer = optimizer
        self._copies = checked_copies(model, copies)
        self._process_group = process_group
        self._ranks("process_group")  # raises where the argument is wrong
        self.settings = PruningSettings(
            criterion=criterion,
            threshold=threshold,
            patience=patience,
            minimum_width=minimum_width,
            round_to=round_to,
            maximum_share=maximum_share,
            target_parameters=target_parameters,
            target_macs=target_macs,
            target_steps=target_steps,
            resource=resource,
            loss_budget=loss_budget,
            compensate=compensate,
            reconstruction_samples=reconstruction_samples,
        )
        self.schedule = Schedule(interval, start, l1_weight, l1_warmup)

        found = find_neurons(model, example_inputs, example_kwargs, streams=check_streams(streams))
        self.refused = found.refused
        neurons = _choose_layers(model, found, layers)
        self._positions = found.positions
        size = ModelSize(model, neurons, found.positions).at()
        self._state = PrunerState.fresh(model, neurons, self.settings, streams, size, history)
        self._hooks: ActivationHooks | None = ActivationHooks(model, neurons.values)
        self._taps: GradientTaps | None = GradientTaps(model, neurons, self._state.saliency)  # behind the other hooks
        observed = [*(value.module for value in neurons.values), *(reader.module for reader in neurons.readers)]
        self._traced = TracedModules(model, observed)
        weakref.finalize(self, _remove_all, self._hooks, self._taps)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or an unpickled pruner is closed, because its model has no hooks of this pruner."""
        return {**self.__dict__, "_hooks": None, "_taps": None, "_traced": None}

    def __repr__(self) -> str:
        widths = ", ".join(f"{name} {width}" for name, width in self.widths.items())
        return f"DynamicPruner({widths}; criterion={self.settings.criterion!r}, threshold={self.settings.threshold})"

    @property
    def widths(self) -> dict[str, int]:
        """Present number of neurons by layer."""
        return self._state.widths

    @property
    def closed(self) -> bool:
        """True after `close()`, and for copies."""
        return self._hooks is None

    @property
    def history(self) -> PruningHistory:
        """Everything that was pruned since the model was constructed, or since this pruner was made."""
        return self._state.history

    @property
    def statistics(self) -> dict[str, NeuronStatistics]:
        """The sums since the last check, by layer.

        Neurons that are read at several places, or together with those of other layers, have statistics at each place,
        under "reader.input" for the first layer that reads them there.
        """
        return dict(zip(self._state.neurons.value_names, self._state.statistics, strict=True))

    @property
    def saliency(self) -> dict[str, Tensor]:
        """The predicted increase of the loss if only this neuron is replaced by its mean, (H,) float64 by layer.

        It is that of the passes since the last check, with criterion "saliency"; NaN before there is one.
        """
        if self._taps is not None:
            self._taps.finish()
        state = self._state
        return {group.name: state.saliency.increase[group.numbers] for group in state.neurons.groups}

    @property
    def l1_weight(self) -> float:
        """The present weight of the L1 penalty for the loss; it rises linearly with the calls of `step()`."""
        schedule, steps = self.schedule, self._state.steps
        return schedule.l1_weight * (min(1.0, steps / schedule.l1_warmup) if schedule.l1_warmup else 1.0)

    @property
    def l1_weights(self) -> list[float]:
        """The present weight of the L1 penalty for each entry of `activations`, in proportion to its neurons' cost.

        The cost is what the removal of one neuron saves now, by `resource` ("macs" where that is None). The mean over
        all neurons is `l1_weight`, so one number serves layers of any size (MorphNet, Gordon et al. 2018,
        arXiv:1711.06798). Pass it to the loss as `l1_weight`; it changes with each prune.
        """
        neurons, resource = self._state.neurons, self.settings.resource or "macs"
        orders = [torch.arange(group.width, device="cpu") for group in neurons.groups]
        remaining = ModelSize(self.model, neurons, self._positions).removing(orders)
        costs = torch.cat(
            [
                torch.full((group.width,), saving(remaining, index, 1, resource), dtype=torch.float64, device="cpu")
                for index, group in enumerate(neurons.groups)
            ]
        )
        mean = costs.mean()
        of_values = [
            costs[value.neurons[value.neurons >= 0]].mean() for value in neurons.values for _ in range(value.calls)
        ]
        return [self.l1_weight * float(cost / mean) if mean > 0 else self.l1_weight for cost in of_values]

    @property
    def activations(self) -> TrackedActivations:
        """The neurons' activations in the latest forward pass: one value for each entry of `statistics`.

        They are the values that the next layers read, taken before a Dropout in front of it, and part of the autograd
        graph; a layer that is called several times in a forward pass has a value for each call. Shapes: (N, H) for a
        Linear layer, (..., H) where it is applied along a sequence, (N, C, *positions) for a convolution. `axes` tells
        which dimension the neurons are. Positions count as samples.
        A pass under torch.no_grad() does not replace activations that were not read yet.

        Raises:
            RuntimeError: there was no forward pass since the pruner was made or last pruned, there was more than one
                with gradients since the activations were last read, or the pruner is closed.
        """
        hooks, taps = self._open("activations")
        values, axes, of_values = list[Tensor](), list[int](), list[NeuronStatistics]()
        neurons = self._state.neurons
        for name, read, statistics in zip(neurons.value_names, neurons.values, self._state.statistics, strict=True):
            seen = hooks.values(read, name)
            if not seen:
                raise RuntimeError(
                    f"activations: no forward pass has reached {name} since the pruner was made or last pruned; "
                    "call the model first (a compiled model must not have been called before the pruner was made)"
                )
            statistics.to(seen[0][0].device)  # the model may have been moved
            for value, axis in seen:
                values.append(value)
                axes.append(axis)
                of_values.append(statistics)
        if self.settings.criterion != "saliency" or not torch.is_grad_enabled():
            return TrackedActivations(values, of_values, axes)
        if not torch.compiler.is_compiling():
            inputs = [hooks.latest(read) for read in neurons.values]
            taps.end_pass(inputs, self._state.statistics, compensate=self.settings.compensate)
        return TrackedActivations(values, of_values, axes, observer=taps)

    def prune(self) -> PruneReport:
        """Check every layer, and remove the neurons that were inactive at `patience` consecutive checks.

        The statistics start afresh afterwards. If anything fails, the model, the optimizer and the pruner stay as they
        were.

        Returns:
            What was done; `print` it. Its `warnings` tell where a layer has collapsed.

        Raises:
            RuntimeError: there are no statistics since the last check, or the pruner is closed. Where several processes
                prune together: one of them failed or differs from the others; nothing is changed on any of them, and
                all raise the same error, which names the rank.
            ValueError: a layer's statistics or weights are not finite, or a tensor of the model or the optimizer does
                not have the expected shape.
            TypeError, ValueError: the user's criterion returned no valid activities.
        """
        return self._prune(self._state, *self._open("prune"))

    def step(self) -> PruneReport | None:
        """Count a training step: call it once after each `optimizer.step()`.

        From step `start` on, every `interval`-th call prunes like `prune()`. If that fails, the step is not counted.

        Returns:
            What a prune did; None at a step without one.
        """
        hooks, taps = self._open("step")
        state, schedule = replace(self._state, steps=self._state.steps + 1), self.schedule
        if schedule.interval is not None and state.steps % schedule.interval == 0:
            if state.steps >= schedule.start:
                return self._prune(state, hooks, taps)
            self.reset()  # the next interval begins with no statistics
        self._state = state
        return None

    def preview(self, threshold: float | None = None) -> Preview:
        """What a prune now would do if every inactive neuron had been inactive for long enough; nothing is changed.

        Args:
            threshold: to be tried instead of the pruner's own.

        Returns:
            The widths, the model's size and the predicted change of the outputs; `print` it.

        Raises:
            RuntimeError, ValueError: as `prune` does.
        """
        _, taps = self._open("preview")
        taps.finish()
        threshold = self.settings.threshold if threshold is None else threshold
        settings = replace(self.settings, threshold=threshold, patience=1)
        observation = self._state.observe(self.model, caller="preview")
        size = ModelSize(self.model, self._state.neurons, self._positions)
        steps = curve(observation, settings, size) if settings.criterion == "saliency" else []
        return Preview.of(decide(observation, settings, size), size, settings.threshold, steps)

    def reset(self) -> None:
        """Discard the statistics since the last check, and activations that were not read."""
        if self._hooks is not None:
            self._hooks.clear()
        for statistics in self._state.statistics:
            statistics.reset()
        self._state.saliency.reset()
        if self._taps is not None:
            self._taps.reset(self._taps.places(self._state.neurons), self._state.saliency)

    def close(self) -> None:
        """Remove the hooks from the model. The history stays readable."""
        if self._hooks is not None and self._taps is not None:
            _remove_all(self._hooks, self._taps)
        self._hooks = self._taps = None

    def state_dict(self) -> dict[str, Any]:
        """Statistics, patience counters, steps, first scales and history, as plain tensors, numbers and strings.

        To resume, rebuild the model with `PruningHistory.from_json(state["history"]).replay(...)`, make an optimizer
        and a pruner for it, and load their states.
        """
        if self._taps is not None:
            self._taps.finish()
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, for a model of the same widths.

        Raises:
            ValueError: the state is of another version, of other layers or of other widths. Nothing is changed.
        """
        self._state = self._state.restored(state)
        if self._taps is not None:
            self._taps.reset(self._taps.places(self._state.neurons), self._state.saliency)
            if self.settings.criterion == "saliency":
                self._taps.prepare(self._state.statistics, compensate=self.settings.compensate)

    def _prune(self, state: PrunerState, hooks: ActivationHooks, taps: GradientTaps) -> PruneReport:
        """Observe, gather, select, plan, apply."""
        taps.finish()
        ranks, wrappers = self._ranks("prune")

        def observe() -> Observation:
            self._traced.require_unchanged(self.model)
            return state.observe(self.model, caller="prune")

        observation = gather(ranks, observe, model=self.model, settings=self.settings, steps=state.steps)
        decision, report = from_rank_0(ranks, partial(self._select, observation))
        following = state.after(decision, self.settings)
        places = taps.places(following.neurons)
        compaction = on_each_rank(ranks, partial(self._plan, decision, following, wrappers))
        refresh = [partial(rewrap, wrapper) for wrapper in wrappers if report.neurons_pruned]
        try:
            on_each_rank(ranks, partial(compaction.apply, refresh))
        except BaseException:
            compaction.undo()
            raise
        hooks.clear()
        taps.reset(places, following.saliency)
        return report

    def _select(self, observation: Observation) -> tuple[Decision, PruneReport]:
        """Select the neurons to be removed; nothing is changed."""
        size = ModelSize(self.model, observation.neurons, self._positions)
        decision = decide(observation, self.settings, size)
        if self.settings.compensate and self.settings.reconstruction_samples:
            decision = replace(decision, reconstructions=_reconstructions(decision))
        return decision, PruneReport.of(decision, size)

    def _plan(
        self, decision: Decision, following: PrunerState, wrappers: Sequence[DistributedDataParallel]
    ) -> CompactionPlan:
        """Prepare the removal of the neurons and the `following` state; nothing is changed."""
        for wrapper in wrappers:
            require_rewrappable(wrapper)
        checked_copies(self.model, self._copies)
        compaction = plan_compaction(self.model, _removal(decision), self._optimizers, self._copies)
        compaction.changes.append(assign(self, "_state", following))
        return compaction

    def _ranks(self, caller: str) -> tuple[Ranks, Sequence[DistributedDataParallel]]:
        wrappers = wrappers_of([self.model, *self._copies])
        return Ranks.of(self._process_group, wrappers, caller=caller), wrappers

    def _open(self, caller: str) -> tuple[ActivationHooks, GradientTaps]:
        if self._hooks is None or self._taps is None:
            raise RuntimeError(f"{caller}: the pruner is closed; copies of a pruner are always closed")
        return self._hooks, self._taps


def _remove_all(hooks: ActivationHooks, taps: GradientTaps) -> None:
    hooks.remove()
    taps.remove()


def _reconstructions(decision: Decision) -> tuple[Reconstruction | None, ...]:
    """For each value, the reconstruction of its removed units; None where their mean is as good."""
    observation, found = decision.observation, []
    for index, value in enumerate(observation.neurons.values):
        gone, reconstruction = units_gone(value, decision.keep), None
        if bool(gone.any()) and (samples := observation.samples_of(index)) is not None:
            left, removed = (~gone).nonzero().flatten(), gone.nonzero().flatten()
            reconstruction = reconstruct(samples, left, removed, observation.outgoing_of(index))
        found.append(reconstruction)
    return tuple(found)


def _removal(decision: Decision) -> Removal:
    neurons = decision.observation.neurons
    if not decision.compensate:
        return Removal(neurons, decision.keep)
    means = tuple(
        statistics.mean if value.positions is None else statistics.position_mean
        for value, statistics in zip(neurons.values, decision.observation.statistics, strict=True)
    )
    return Removal(neurons, decision.keep, means, decision.reconstructions)


# --- Arguments


def _checked_model(model: nn.Module) -> nn.Module:
    """The model without its wrappers."""
    inner = unwrapped(model)
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "model: DataParallel computes in replicas that cannot be observed; use DistributedDataParallel"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("model: a scripted module cannot be changed; pass the module it was made from")
    if any(nn.parameter.is_lazy(each) for each in (*model.parameters(), *model.buffers())):
        raise UnsupportedModelError("model: its lazy modules have no parameters yet; call it on a batch first")
    return inner


def _checked_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None, model: nn.Module) -> tuple[Optimizer, ...]:
    if optimizer is None or isinstance(optimizer, Optimizer):
        optimizers: Sequence[Optimizer] = () if optimizer is None else (optimizer,)
    elif isinstance(optimizer, Sequence) and all(isinstance(each, Optimizer) for each in optimizer):
        optimizers = optimizer
    else:
        got = f"{optimizer!r}" if isinstance(optimizer, list | tuple) else type(optimizer).__name__
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, a list of them or None, got {got}")
    optimizers = with_inner_optimizers(optimizers)
    for each in optimizers:
        held = {id(parameter) for group in each.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise ValueError(
                f"optimizer: {type(each).__name__} holds none of the model's parameters; was it made for another model?"
            )
    return tuple(optimizers)


def _choose_layers(model: nn.Module, found: TracedNeurons, layers: Sequence[str] | None) -> PrunableNeurons:
    groups, refused = found.groups, found.refused
    if layers is None:
        if groups:
            return found.neurons
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise UnsupportedModelError(
            f"model: it has no layer that can be pruned{reasons or ', because it has no Linear layer or convolution'}"
        )
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(n, str) for n in layers):
        raise TypeError(f"layers: expected a list of layer names or None, got {layers!r}")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers: expected at least one name and no repeated ones, got {layers!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    producers = {name for group in groups.values() for name in group.producers}
    for name in layers:
        if name not in producers:
            reason = f"the model has no such module; its prunable layers are {', '.join(groups) or 'none'}"
            group = found.neurons.group_of(name)
            if group is not None:
                reason = f"it has the neurons of {group.name} and is pruned with that layer; name {group.name} instead"
            elif name in modules:
                reason = f"it is a {type(modules[name]).__name__}; only layers that write neurons can be pruned"
            raise UnsupportedModelError(f"layers: {name} cannot be pruned: {refused.get(name, reason)}")
    return found.neurons.only([group for group in groups.values() if not set(layers).isdisjoint(group.producers)])
