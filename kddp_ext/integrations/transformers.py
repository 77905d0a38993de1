"""Dynamic pruning as a callback of the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kddp_ext.files import atomic_write
from kddp_ext.integrations.student_pruning import StudentPruning
from kddp_ext.pruning.tracing.graph import uncompiled

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import logging
except ImportError as error:
    raise ModuleNotFoundError(
        "kddp_ext.integrations.transformers: transformers missing; install with: pip install 'kddp_ext[transformers]'",
        name="transformers",
    ) from error

STATE_FILE = "pruning.pt"

logger = logging.get_logger(__name__)


class DynamicPruning(StudentPruning, TrainerCallback):
    """Prunes the Trainer's model at the end of every n-th epoch, or every so many steps.

    The Trainer's `compute_loss` passes `pruning.pruner.activations` to `kddp_ext.fused_kd_l1_loss`, where
    `pruning` is this callback; docs/integrations.md has it whole. After every epoch the widths and the number
    of parameters go into `trainer.state.log_history`, as `width/<layer>` and `parameters`.

    Each checkpoint folder gets a file `pruning.pt` with the history. To resume, make the model anew, give
    `TrainingArguments` the folder as `resume_from_checkpoint`, and make the Trainer: the model is pruned as it
    was, and `trainer.train(resume_from_checkpoint=folder)` finds that the weights fit.

    Args:
        example_inputs: positional arguments for the model's forward, as a tuple; moved to its device.
        every_n_epochs: how often to prune. Default 1. None, and an `interval` among the settings: by steps.
        settings: `criterion`, `threshold`, `patience` and the like, as of `DynamicPruner`.

    Attributes:
        pruner: the `DynamicPruner`; None before training starts.
        report: what the latest prune did, a `PruneReport`; None before.

    Raises:
        ValueError: (when training starts) the process has several GPUs, or `load_best_model_at_end` is set; or an
            error of `DynamicPruner`.
    """

    def rebuild(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        """Prune a fresh model as the one of a checkpoint folder was, so that the folder's weights fit.

        Raises:
            FileNotFoundError: the folder has no `pruning.pt`.
            ValueError: the model is not of the architecture that was pruned, or is smaller already.
        """
        state = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        self.restore_pruning(uncompiled(model), state)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **others: Any
    ) -> None:
        """Shrink the model if training is to be resumed: the weights are loaded before training begins."""
        if args.resume_from_checkpoint is not None:
            self.rebuild(model, args.resume_from_checkpoint)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **others: Any,
    ) -> None:
        """Make the pruner."""
        if args.n_gpu > 1:
            raise ValueError(f"args: expected one GPU a process, got {args.n_gpu}; launch one process for each")
        if args.load_best_model_at_end:
            raise ValueError("args: load_best_model_at_end would load a wider model's weights into the pruned one")
        # Accelerate's wrapper hides of which kind the optimizer is.
        self.start_pruning(uncompiled(model), getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Count a step of the optimizer."""
        self.step_ended()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Prune if it is due, and log. Where `max_steps` ends training within an epoch, that is no epoch."""
        epochs = round(state.epoch)
        if abs(state.epoch - epochs) > 1e-6:
            return
        self.epoch_ended(epochs)
        figures = self.pruning_figures()
        state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})
        logger.info(f"epoch {epochs}: {self.report}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Write the history beside the weights."""
        if not args.should_save:  # another process does
            return
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        content = self.pruning_state()
        atomic_write(folder / STATE_FILE, lambda file: torch.save(content, file))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Take the hooks off the model."""
        self.stop_pruning()
