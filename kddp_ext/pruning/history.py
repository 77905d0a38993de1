"""The history of everything that was pruned; a fresh network can be shrunk in the same way from it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kddp_ext.files import parse_json
from kddp_ext.pruning.compaction import Removal, plan_compaction
from kddp_ext.pruning.settings import Streams, check_streams
from kddp_ext.pruning.tracing.find import find_neurons
from kddp_ext.pruning.tracing.structure import count_neurons

FORMAT, VERSION = "kddp_ext.pruning_history", 1
_MOST_CHARACTERS = 2**24  # of JSON: enough for two million pruned neurons

_brief = reprlib.repr  # shows the first few of what may be millions of items


class PruningHistory:
    """The pruned neurons of each layer, step by step, by their indices before any pruning.

    Args:
        original_widths: number of neurons by layer, before any pruning.
        streams: the argument of the `DynamicPruner` that decided what the layers' neurons are. Default "exact".

    Attributes:
        original_widths, streams: the arguments.
        steps: for each step, the pruned neurons (ascending original indices) by layer.
    """

    def __init__(self, original_widths: Mapping[str, int], *, streams: Streams = "exact") -> None:
        self.original_widths: dict[str, int] = {}
        self.streams: Streams = check_streams(streams)
        for layer, width in original_widths.items():
            if not isinstance(layer, str) or not _is_int(width) or width < 1:
                got = f"{_brief(layer)}: {_brief(width)}"
                raise ValueError(f"original_widths: expected widths of at least 1 by layer name, got {got}")
            self.original_widths[layer] = width
        self.steps: list[dict[str, list[int]]] = []
        self._lost: dict[str, set[int]] = {layer: set() for layer in self.original_widths}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruningHistory):
            return NotImplemented
        mine, others = ((each.original_widths, each.streams, each.steps) for each in (self, other))
        return mine == others

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def __repr__(self) -> str:
        layers = ", ".join(f"{name} {width}→{self.widths[name]}" for name, width in self.original_widths.items())
        return f"PruningHistory({layers}; {len(self.steps)} step{'' if len(self.steps) == 1 else 's'})"

    @property
    def widths(self) -> dict[str, int]:
        """Number of neurons by layer, after all steps."""
        return {layer: width - len(self._lost[layer]) for layer, width in self.original_widths.items()}

    def pruned(self, layer: str) -> list[int]:
        """Original indices of the neurons that `layer` lost, ascending."""
        return sorted(self._lost[layer])

    def kept(self, layer: str) -> list[int]:
        """Original indices of the neurons that `layer` still has, ascending."""
        return [index for index in range(self.original_widths[layer]) if index not in self._lost[layer]]

    def add_step(self, pruned: Mapping[str, Sequence[int]]) -> None:
        """Record one step; a step that pruned nothing is not recorded.

        Args:
            pruned: original indices by layer.

        Raises:
            ValueError: a layer or an index is unknown, an index was pruned before or is repeated, or a layer would lose
                all neurons. Nothing is recorded then.
        """
        step = {}
        for layer, indices in pruned.items():
            if layer not in self.original_widths:
                raise ValueError(f"pruned: no layer {layer!r}; the history has {_brief(list(self.original_widths))}")
            width, lost, going = self.original_widths[layer], self._lost[layer], set()
            for index in indices:
                if not _is_int(index) or not 0 <= index < width:
                    raise ValueError(f"pruned: {layer} has neurons 0 to {width - 1}, got {_brief(index)}")
                if index in lost or index in going:
                    raise ValueError(f"pruned: neuron {index} of {layer} is pruned twice")
                going.add(index)
            if len(lost) + len(going) == width:
                raise ValueError(f"pruned: {layer} would lose its {count_neurons(width)}, and one must stay")
            if going:
                step[layer] = sorted(going)
        for layer, indices in step.items():
            self._lost[layer].update(indices)
        if step:
            self.steps.append(step)

    def copy(self) -> PruningHistory:
        """An independent history with the same steps."""
        other = PruningHistory(self.original_widths, streams=self.streams)
        other.steps = [dict(step) for step in self.steps]
        other._lost = {layer: set(lost) for layer, lost in self._lost.items()}
        return other

    def extended(self, widths: Mapping[str, int]) -> PruningHistory:
        """An independent history that also has the layers of `widths` that this one lacks, with nothing pruned."""
        other = self.copy()
        for layer, width in PruningHistory(widths).original_widths.items():
            if layer not in other.original_widths:
                other.original_widths[layer], other._lost[layer] = width, set()
        return other

    def to_json(self) -> str:
        """The history as JSON text, with its format and version."""
        content = {"format": FORMAT, "version": VERSION, "original_widths": self.original_widths, "steps": self.steps}
        return json.dumps(content if self.streams == "exact" else {**content, "streams": self.streams})

    @classmethod
    def from_json(cls, text: str) -> PruningHistory:
        """Read the result of `to_json`.

        Raises:
            ValueError: the text is not a history, is of another version, or contradicts itself.
        """
        try:
            content = parse_json(text, most=_MOST_CHARACTERS)
        except ValueError as error:
            raise ValueError(f"text: expected the JSON of a pruning history: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"text: expected JSON with format {FORMAT!r}, got {_brief(content)}")
        if content.get("version") != VERSION:
            raise ValueError(f"text: expected a history of version {VERSION}, got {_brief(content.get('version'))}")
        widths, steps = content.get("original_widths"), content.get("steps")
        if not isinstance(widths, dict) or not isinstance(steps, list):
            got = f"{_brief(widths)} and {_brief(steps)}"
            raise ValueError(f"text: expected original_widths by layer and a list of steps, got {got}")
        history = cls(widths, streams=content.get("streams", "exact"))
        for step in steps:
            if not isinstance(step, dict) or not all(isinstance(indices, list) for indices in step.values()):
                raise ValueError(f"text: expected each step to have lists of neurons by layer, got {_brief(step)}")
            history.add_step(step)
        return history

    def replay(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Shrink a fresh model to the widths of this history.

        Its parameters keep the values of the remaining neurons; nothing is compensated.

        Args:
            model: of the architecture that was pruned, at its original widths.
            example_inputs: positional arguments for its forward.
            example_kwargs: keyword arguments for it. Default: none.

        Raises:
            UnsupportedModelError: the model cannot be traced.
            ValueError: a layer is missing, cannot be pruned, or does not have its original width (for instance because
                the history was replayed on it before). The model is not changed.
        """
        found = find_neurons(model, example_inputs, example_kwargs, streams=self.streams)
        keep = torch.ones(found.neurons.number, dtype=torch.bool, device="cpu")
        for layer, width in self.original_widths.items():
            if layer not in found.groups:
                reason = found.refused.get(layer, "it has no such layer")
                raise ValueError(f"model: the history has a layer {layer!r} that cannot be pruned here: {reason}")
            group = found.groups[layer]
            if group.width != width:
                raise ValueError(
                    f"model: {layer} has {count_neurons(group.width)} but the history starts from {width}; replay it "
                    "once, on a model with its original widths"
                )
            keep[group.numbers][self.pruned(layer)] = False
        plan_compaction(model, Removal(found.neurons, keep)).apply()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
