"""The part that all callbacks share: the pruner of a student that another library trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.report import PruneReport
from kddp_ext.pruning.settings import whole_number


class StudentPruning:
    """The pruner of one student, over several trainings; its hooks are removed after each of them.

    Args:
        example_inputs: positional arguments for the student's forward, as a tuple; they are moved to its device.
        every_n_epochs: how often to prune. Default 1. None, with an `interval` among the settings: by steps.
        settings: `criterion`, `threshold`, `patience` and the other settings of `DynamicPruner`. Tensors of
            `example_kwargs` are moved to the student's device, too.

    Attributes:
        pruner: the `DynamicPruner`; None before training starts.
        report: what the latest prune did, a `PruneReport`; None before.
    """

    def __init__(self, *, example_inputs: tuple[Any, ...], every_n_epochs: int | None = 1, **settings: Any) -> None:
        if settings.get("interval") is not None and every_n_epochs is not None:
            raise ValueError("interval: it counts steps; pass every_n_epochs=None with it to prune by steps only")
        if every_n_epochs is not None:
            every_n_epochs = whole_number("every_n_epochs", every_n_epochs, at_least=1)
        self.example_inputs = example_inputs
        self.every_n_epochs = every_n_epochs
        self.settings = settings
        self.pruner: DynamicPruner | None = None
        self.report: PruneReport | None = None
        self._state: Mapping[str, Any] | None = None  # for the next pruner

    def start_pruning(self, student: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> DynamicPruner:
        """Make the pruner, in the state of the previous training or of a restored checkpoint."""
        self.stop_pruning()
        pruner = DynamicPruner(student, optimizer, **{**self.settings, **self._examples(student)})
        if self._state is not None:
            pruner.load_state_dict(self._state)
        self.pruner = pruner
        return pruner

    def stop_pruning(self) -> None:
        """Remove the pruner's hooks from the student; its history and state stay."""
        self._state = self.pruning_state()
        if self.pruner is not None:
            self.pruner.close()

    def epoch_ended(self, epochs: int) -> None:
        """Prune if this number of finished epochs makes it due."""
        assert self.pruner is not None
        if self.every_n_epochs is not None and epochs % self.every_n_epochs == 0:
            self.report = self.pruner.prune()

    def step_ended(self) -> None:
        """Count a step of the optimizer, for `interval` and `l1_warmup`."""
        assert self.pruner is not None
        self.report = self.pruner.step() or self.report

    def pruning_figures(self) -> dict[str, float]:
        """The values to log: the width of each layer, and the student's number of parameters."""
        assert self.pruner is not None
        figures = {f"width/{layer}": float(width) for layer, width in self.pruner.widths.items()}
        return {**figures, "parameters": float(sum(p.numel() for p in self.pruner.model.parameters()))}

    def pruning_state(self) -> Mapping[str, Any] | None:
        """The state for a checkpoint: tensors, numbers and strings; None before any training."""
        return self._state if self.pruner is None else self.pruner.state_dict()

    def restore_pruning(self, student: nn.Module, state: Mapping[str, Any]) -> None:
        """Shrink a fresh student to the widths of `state`, with which the next training starts.

        A student that this pruner has already brought to these widths is not changed.
        """
        history = PruningHistory.from_json(state["history"])
        already = self.pruner is not None and self.pruner.model is student and self.pruner.widths == history.widths
        if not already:
            history.replay(student, **self._examples(student))
        self.stop_pruning()
        self.pruner, self._state = None, state

    def _examples(self, student: nn.Module) -> dict[str, Any]:
        """`example_inputs` and `example_kwargs` on the student's device."""
        device = next(student.parameters()).device

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        named = self.settings.get("example_kwargs") or {}
        return {
            "example_inputs": tuple(moved(value) for value in self.example_inputs),
            "example_kwargs": {name: moved(value) for name, value in named.items()},
        }
