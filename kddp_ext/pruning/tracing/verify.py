"""Proves groups of neurons: the model is traced again with fewer neurons, and must run the same operations.

A recording holds the numbers that Python computed, so it cannot tell a constant from a number that depends on a width
(1/sqrt(width), an asserted size). Comparing it with the recording of a narrowed model can. One neuron fewer and half of
them are tried, because a width that is used in arithmetic may survive one of the two (`width // 4`).

Modules hold sizes in attributes of any name, such as the number of heads. Where a proof fails, attributes that have the
value of a size with which the neurons are split or joined are tried: one that lets the narrowed model run further is a
size that must follow. Groups of the same width are then narrowed by different numbers of neurons, because a size could
follow the wrong group otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap, zip_longest
from typing import Any

import torch
from torch import Tensor

from kddp_ext.pruning.tracing.analysis import Analysis
from kddp_ext.pruning.tracing.flow import NeuronFlow
from kddp_ext.pruning.tracing.operations.movements import SIZED
from kddp_ext.pruning.tracing.operations.normalisation import same_epsilon
from kddp_ext.pruning.tracing.operations.table import FACTORIES
from kddp_ext.pruning.tracing.recording import ModuleCall, Operation, Recorder, Recording, UnsupportedModelError
from kddp_ext.pruning.tracing.structure import NeuronCount, NeuronGroup, PrunableNeurons

# Whether these are run depends on memory layouts, which sizes of 1 change; the shapes behind them are compared.
_LAYOUT_ONLY = ("view", "as_strided", "_unsafe_view", "reshape", "clone", "expand", "alias", "detach", "_reshape_alias")

_DEPENDS = "so the model depends on the number of neurons"


def verified(recorder: Recorder, analysis: Analysis) -> tuple[PrunableNeurons, dict[str, Failure]]:
    """The neurons whose groups are proven, and by the name of each other group why it is not."""
    proof = _Proof(recorder, analysis)
    refuted = proof.run()
    return proof.neurons.only([group for group in proof.neurons.groups if group.name not in refuted]), refuted


@dataclass(frozen=True)
class Failure:
    """What changes in the forward pass with fewer neurons."""

    half: bool
    flow: NeuronFlow
    position: int  # among the operations that are compared
    reason: str
    modules: tuple[str, ...]  # that were running, from the innermost outwards


class _Proof:
    def __init__(self, recorder: Recorder, analysis: Analysis) -> None:
        self._recorder, self._analysis = recorder, analysis
        self.neurons = analysis.neurons
        self._apart = False  # whether groups of the same width lose different numbers of neurons
        self._compared = [_compared(flow.recording) for flow in analysis.flows]
        same_width: Counter[int] = Counter()
        self._rank: dict[str, int] = {}  # by group name, the number of earlier groups of its width
        for group in self.neurons.groups:
            self._rank[group.name] = same_width[group.width]
            same_width[group.width] += 1
        # The same code runs in both modes then, so each narrowing is tried in one of them.
        self._alike = all(starmap(_same_code, zip_longest(*map(_without_modes, self._compared))))

    def run(self) -> dict[str, Failure]:
        """Find all sizes that must follow, and refute what still fails: the failure by group name."""
        remaining, refuted = list(self.neurons.groups), dict[str, Failure]()
        candidates: list[list[NeuronCount]] | None = None
        vain: set[tuple[int, str]] = set()
        while remaining:
            failure = self._failure(remaining)
            if failure is None:
                break
            if candidates is None:
                candidates = self._candidates()
                self._apart = bool(candidates)
                if self._apart:
                    continue
            if self._follow_one(candidates, remaining, failure, vain):
                continue
            refuted.update(self._guilty(failure, remaining))
            remaining = [group for group in remaining if group.name not in refuted]
        return refuted

    def _follow_one(
        self,
        candidates: list[list[NeuronCount]],
        groups: Sequence[NeuronGroup],
        failure: Failure,
        vain: set[tuple[int, str]],
    ) -> bool:
        """Let the first of `candidates` that lets the model run further follow, and take it out of the list.

        `vain` collects what did not help: an index of `candidates` and the class of the module that failed. This is
        not tried again for the next module of the class.
        """
        before = self.neurons
        failed = type(self._analysis.model.get_submodule(next(iter(failure.modules), ""))).__name__
        for index, counts in enumerate(candidates):
            if (index, failed) in vain or not any(each.module in failure.modules for each in counts):
                continue
            self.neurons = replace(before, counts=(*before.counts, *counts))
            after = self._failure_at(groups, failure.half, failure.flow)
            if after is None or after.position > failure.position:
                taken = {(each.module, each.attribute) for each in counts}
                rest = ([one for one in each if (one.module, one.attribute) not in taken] for each in candidates)
                candidates[:] = [each for each in rest if each]
                vain.clear()
                return True
            vain.add((index, failed))
        self.neurons = before
        return False

    def _failure(self, groups: Sequence[NeuronGroup]) -> Failure | None:
        """What changes in the forward pass with fewer neurons in each of `groups`; None where nothing does."""
        training, evaluation = self._analysis.flows
        attempts = [(False, training), (True, evaluation), (False, evaluation), (True, training)]
        failures = (self._failure_at(groups, *each) for each in attempts[: 2 if self._alike else 4])
        return next((failure for failure in failures if failure is not None), None)

    def _guilty(self, failure: Failure, groups: Sequence[NeuronGroup]) -> dict[str, Failure]:
        """The groups that cause a failure, by name: those that fail there alone, or all that are involved."""
        involved = self._involved(failure, groups)
        if len(involved) == 1:
            return {involved[0].name: failure}
        tried = {each.name: self._failure_at([each], failure.half, failure.flow) for each in involved}
        alone = {name: each for name, each in tried.items() if each is not None}
        # What fails behind is not the cause; a size may still be found that lets it follow.
        causes = {name: each for name, each in alone.items() if each.position <= failure.position}
        return causes or alone or {each.name: failure for each in involved}

    def _involved(self, failure: Failure, groups: Sequence[NeuronGroup]) -> list[NeuronGroup]:
        """The groups whose neurons the failing operation reads or returns."""
        compared = self._compared[self._analysis.flows.index(failure.flow)]
        operation = compared[min(failure.position, len(compared) - 1)]
        found: set[int] = set()
        for tensor in (*operation.inputs, *operation.outputs):
            for labels in failure.flow.labels.of(tensor):
                numbers = self._analysis.numbers(labels)
                found.update([] if numbers is None else numbers.tolist())
        involved = [group for group in groups if not found.isdisjoint(range(group.start, group.start + group.width))]
        return involved or list(groups)

    def _failure_at(self, groups: Sequence[NeuronGroup], half: bool, flow: NeuronFlow) -> Failure | None:
        """The same with one or a few neurons fewer, or about `half` of them, in the mode of one recording."""
        neurons, model = self.neurons, self._recorder.model
        keep = torch.ones(neurons.number, dtype=torch.bool, device="cpu")
        most = 1
        for group in (group for group in groups if group.width > 1):
            rank = self._rank[group.name] if self._apart else 0
            if half:
                keep[group.numbers][1::2][rank % (group.width // 2) :] = False
            else:
                fewer_by = 1 + rank % (group.width - 1)
                keep[group.numbers][-fewer_by:] = False
                most = max(most, fewer_by)
        shapes = {stored: neurons.shape_after(stored, keep) for stored in neurons.slices}
        index = self._analysis.flows.index(flow)
        fewer = "half of the neurons" if half else "one neuron fewer" if most == 1 else "a few neurons fewer"
        changes = neurons.attributes_after(model, keep)
        before = [getattr(module, attribute) for module, attribute, _ in changes]
        try:
            for change in changes:
                setattr(*change)
            narrow = self._recorder.record(training=index == 0, shapes=shapes)
        except UnsupportedModelError as error:
            latest = self._recorder.latest
            position = len(_compared(latest))
            return Failure(half, flow, position, f"with {fewer}, {error}", _running(latest.unfinished))
        finally:
            for (module, attribute, _), value in zip(changes, before, strict=True):
                setattr(module, attribute, value)
        gone = self._analysis.gone(keep)
        for position, (old, new) in enumerate(zip_longest(self._compared[index], _compared(narrow))):
            norm = flow.norms.get(id(old))
            epsilon = None if norm is None or norm not in neurons.norms else neurons.epsilon_after(norm, model, keep)
            reason = _difference(flow, old, new, gone, epsilon)
            if reason is not None:
                calls = [each.call for each in self._compared[index][max(position - 1, 0) : position + 1][::-1]]
                return Failure(half, flow, position, f"with {fewer}, {reason}", _running(*calls))
        return None

    def _candidates(self) -> list[list[NeuronCount]]:
        """Attributes that are, or as tuples contain, a size with which neurons are split or joined.

        Those of one name in modules of one class are tried together. Each follows a stored tensor's dimension that
        consists of the same neurons.
        """
        found: dict[tuple[str, str], list[NeuronCount]] = {}  # by module and attribute
        known = {(each.module, each.attribute) for each in self.neurons.counts}
        for flow in self._analysis.flows:
            for operation, labels in flow.sites:
                followed = self._analysis.followed(labels)
                if followed is None:
                    continue
                for call in operation.call.stack:
                    module = self._analysis.model.get_submodule(call.module)
                    for attribute, value in vars(module).items():
                        if not _is_size(value, labels.numel()) or hasattr(type(module), attribute):
                            continue
                        if (call.module, attribute) not in known:
                            count = NeuronCount(call.module, attribute, *followed)
                            alike = found.setdefault((call.module, attribute), [])
                            alike += [] if count in alike else [count]
        together: dict[tuple[str, str, int], list[NeuronCount]] = {}
        for (name, attribute), counts in found.items():
            kind = type(self._analysis.model.get_submodule(name)).__name__
            counts.sort(key=lambda count: not count.stored.module.startswith(count.module))  # its own tensors first
            for index, count in enumerate(counts):
                together.setdefault((kind, attribute, index), []).append(count)
        return [together[kind] for kind in sorted(together, key=lambda kind: "head" not in kind[1])]


def _is_size(value: Any, size: int) -> bool:
    """Whether an attribute is an integer, or a shape with one dimension, of this size."""
    return value == size if type(value) is int else type(value) is tuple and list(value).count(size) == 1


def _compared(recording: Recording) -> list[Operation]:
    return [each for each in recording.operations if each.name not in _LAYOUT_ONLY]


def _running(*calls: ModuleCall | None) -> tuple[str, ...]:
    """The modules of some calls and of their callers."""
    return tuple(each.module for call in calls if call is not None for each in call.stack)


def _without_modes(operations: Sequence[Operation]) -> list[Operation]:
    """The operations without those that dropout and the batch counter of a BatchNorm run in training only."""
    return [
        each for each in operations
        if not each.name.endswith("dropout") and (each.outputs[0].dim() or each.outputs[0].is_floating_point())
    ]  # fmt: skip


def _same_code(training: Operation | None, evaluation: Operation | None) -> bool:
    """Whether two operations are the same, with the same numbers, apart from the statistics that a BatchNorm uses."""
    if training is None or evaluation is None or training.call.module != evaluation.call.module:
        return False
    if "batch_norm" in training.name and "batch_norm" in evaluation.name:
        return True
    return training.target is evaluation.target and list(_numbers(training)) == list(_numbers(evaluation))


def _difference(
    flow: NeuronFlow, before: Operation | None, after: Operation | None, gone: Tensor, epsilon: float | None
) -> str | None:
    """How an operation of the narrow recording differs from what is expected, if it does.

    `gone` is a mask of the labels whose entries are missing in the narrow recording; `epsilon` is the number that a
    norm adds there.
    """
    if before is None or after is None:
        return "it runs more or fewer operations"
    if before.target is not after.target:
        return f"{before.title} in {flow.place(before)} becomes {after.title}"
    for old, new in zip(before.outputs, after.outputs, strict=True):
        expected = [
            size if labels is None else size - int(gone[labels].sum())
            for size, labels in zip(old.shape, flow.labels.of(old), strict=True)
        ]
        if list(new.shape) != expected:
            return (
                f"{before.title} in {flow.place(before)} gives the shape {tuple(new.shape)} instead of "
                f"{tuple(expected)}, {_DEPENDS}"
            )
    if before.name == "slice" and not _same_bounds(flow, before, after, gone):
        return f"slice in {flow.place(before)} cuts them at an index that does not follow their number"
    numbers, others = list(_numbers(before)), list(_numbers(after))
    if numbers != others if epsilon is None else len(others) != 1 or not same_epsilon(others[0], epsilon):
        return f"{before.title} in {flow.place(before)} computes with another number, {_DEPENDS}"
    if not all(map(_same_constant, before.inputs, after.inputs)):
        return f"{before.title} in {flow.place(before)} computes with another constant tensor, {_DEPENDS}"
    return None


def _same_bounds(flow: NeuronFlow, before: Operation, after: Operation, gone: Tensor) -> bool:
    """Whether a slice of the narrowed model begins at the same neuron."""
    source, narrowed, axis = before.args[0], after.args[0], before.argument("dim", 0)
    labels = flow.labels.of(source)[axis]
    if labels is None:
        return True
    start, there = (
        slice(each.argument("start"), None).indices(tensor.shape[axis])[0]
        for each, tensor in ((before, source), (after, narrowed))
    )
    return there == start - int(gone[labels[:start]].sum())


def _numbers(operation: Operation) -> Iterator[Any]:
    """The arguments that are no tensors. Sizes are left out, because the shapes of outputs are compared."""
    if operation.name in SIZED or operation.name in FACTORIES:
        return
    arguments: Any = (operation.args, operation.kwargs)
    if operation.name == "convolution":
        arguments = operation.args[3:8]  # without the number of groups
    elif operation.name in ("native_layer_norm", "native_group_norm"):
        arguments = operation.args[-1]  # eps
    yield from _plain(arguments)


def _plain(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from _plain(each)
    elif isinstance(value, Mapping):
        yield from _plain(list(value.items()))
    elif not isinstance(value, Tensor):
        yield value


def _same_constant(before: Tensor, after: Tensor) -> bool:
    """True unless both are constants with other values; a fake tensor remembers the constant it was made from."""
    old, new = (getattr(each, "constant", None) for each in (before, after))
    if old is None or new is None:
        return (old is None) == (new is None)
    return old.shape == new.shape and bool(torch.equal(old, new))
