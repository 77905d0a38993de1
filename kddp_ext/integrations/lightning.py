"""Dynamic pruning as a callback of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kddp_ext.integrations.student_pruning import StudentPruning
from kddp_ext.pruning.tracing.recording import unwrapped

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
except ImportError as error:
    raise ModuleNotFoundError(
        "kddp_ext.integrations.lightning: lightning missing; install with: pip install 'kddp_ext[lightning]'",
        name="lightning",
    ) from error


# The attributes that the module gets while the Trainer runs, and the attribute that holds their previous values.
_OURS, _BEFORE = ("on_load_checkpoint", "pruner"), "_kddp_before"


class DynamicPruning(StudentPruning, Callback):
    """Prunes the student at the end of every n-th epoch, or every n-th step.

    While `trainer.fit` runs, the LightningModule's attribute `pruner` is the `DynamicPruner`, so that `training_step`
    can pass `self.pruner.activations` to `kddp_ext.fused_kd_l1_loss`. After every epoch, the width of each layer and
    the number of parameters are logged as `width/<layer>` and `parameters`.

    Checkpoints contain its state. To resume, pass a fresh module to `trainer.fit(module, ckpt_path=...)` (or validate,
    test, predict); the student is pruned as before, and then its weights are loaded.

    Args:
        example_inputs: positional arguments for the student's forward, as a tuple; they are moved to its device.
        every_n_epochs: how often to prune. Default 1. None, with an `interval` among the settings: by steps.
        student: the attribute of the LightningModule that is the student. Default None: the module itself.
        **settings: `criterion`, `threshold`, `patience` and the other settings of `DynamicPruner`. Tensors of
            `example_kwargs` are moved to the student's device, too.

    Attributes:
        pruner: the `DynamicPruner`; None before training starts.
        report: what the latest prune did, a `PruneReport`; None before.

    Raises:
        ValueError: (when training starts) the strategy spawns or forks processes, or no optimizer holds the student's
            parameters; or an error of `DynamicPruner`.
    """

    def __init__(
        self,
        *,
        example_inputs: tuple[Any, ...],
        every_n_epochs: int | None = 1,
        student: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(example_inputs=example_inputs, every_n_epochs=every_n_epochs, **settings)
        self.student = student
        self._global_step = 0

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint, one for each student of a module."""
        return f"{type(self).__qualname__}{{student={self.student!r}}}"

    def rebuild(self, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Prune a fresh module like the one of `checkpoint`, so that the weights of the checkpoint fit.

        `trainer.fit(module, ckpt_path=...)` calls it. Without a Trainer, call it before
        `module.load_state_dict(checkpoint["state_dict"])`.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            self.restore_pruning(self._student(pl_module), state["pruner"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook into the module's loading of a checkpoint; a callback's hook would run after the weights are loaded."""
        own = pl_module.__dict__
        own.setdefault(_BEFORE, {name: own[name] for name in _OURS if name in own})  # by the first of several callbacks
        original = pl_module.on_load_checkpoint

        def rebuild_first(checkpoint: dict[str, Any]) -> None:
            self.rebuild(pl_module, checkpoint)
            original(checkpoint)

        pl_module.on_load_checkpoint = rebuild_first

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the pruner: the optimizers exist by now, and their state is not loaded yet."""
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "trainer: strategies that spawn or fork load the weights back into the main process, where the student "
                "still has its original width; use strategy='ddp'"
            )
        student = self._student(pl_module)
        parameters = set(student.parameters())
        holding = [
            optimizer
            for optimizer in trainer.optimizers
            if any(not parameters.isdisjoint(group["params"]) for group in optimizer.param_groups)
        ]
        if not holding:
            raise ValueError("trainer: none of its optimizers holds a parameter of the student")
        pl_module.pruner = self.start_pruning(student, holding)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._global_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Count the step, unless gradients were only accumulated."""
        if trainer.global_step > self._global_step:
            self._global_step = trainer.global_step
            self.step_ended()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_ended(trainer.current_epoch + 1)
        pl_module.log_dict(self.pruning_figures())

    def state_dict(self) -> dict[str, Any]:
        state = self.pruning_state()
        return {} if state is None else {"pruner": state}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's attributes; its width stays."""
        self.stop_pruning()
        before = pl_module.__dict__.pop(_BEFORE, None)
        if before is not None:
            for name in _OURS:
                pl_module.__dict__.pop(name, None)
            pl_module.__dict__.update(before)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def _student(self, pl_module: LightningModule) -> nn.Module:
        student = pl_module if self.student is None else getattr(pl_module, self.student, None)
        if not isinstance(student, nn.Module):
            raise ValueError(f"student: {type(pl_module).__name__} has no module named {self.student!r}")
        return unwrapped(student)
