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
from kddp_ext.pruning.tracing.recording import unwrapped

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
    """Prunes the Trainer's model at the end of every n-th epoch, or every n-th step.

    The Trainer's `compute_loss` passes `pruning.pruner.activations` to `kddp_ext.fused_kd_l1_loss`, where `pruning` is
    this callback; docs/integrations.md shows all of it. After every epoch, the width of each layer and the number of
    parameters are added to `trainer.state.log_history`, as `width/<layer>` and `parameters`.

    Each checkpoint folder gets a file `pruning.pt` with the history. To resume, make a fresh model, pass the folder to
    `TrainingArguments` as `resume_from_checkpoint`, and make the Trainer. The model is then pruned as before, and
    `trainer.train(resume_from_checkpoint=folder)` can load the weights.

    Arguments and attributes are those of `StudentPruning`.

    Raises:
        ValueError: (when training starts) the process has several GPUs, or `load_best_model_at_end` is set; or an
            error of `DynamicPruner`.
    """

    def rebuild(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        """Prune a fresh model like the one of a checkpoint folder, so that the folder's weights fit.

        Raises:
            FileNotFoundError: the folder has no `pruning.pt`.
            ValueError: the model has another architecture than the one that was pruned, or is already smaller.
        """
        state = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        self.restore_pruning(unwrapped(model), state)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **others: Any
    ) -> None:
        """Prune the model if training will be resumed, since the weights are loaded before `on_train_begin`."""
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
        if args.n_gpu > 1:
            raise ValueError(f"args: expected one GPU for each process, got {args.n_gpu}; launch one process per GPU")
        if args.load_best_model_at_end:
            raise ValueError("args: load_best_model_at_end would load a wider model's weights into the pruned one")
        # The optimizer itself is inside Accelerate's wrapper.
        self.start_pruning(unwrapped(model), getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self.step_ended()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Prune if it is due, and log. An epoch that `max_steps` cuts short does not count."""
        epochs = round(state.epoch)
        if abs(state.epoch - epochs) > 1e-6:
            return
        self.epoch_ended(epochs)
        figures = self.pruning_figures()
        state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})
        logger.info(f"epoch {epochs}: {self.report}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            content = self.pruning_state()
            atomic_write(folder / STATE_FILE, lambda file: torch.save(content, file))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.stop_pruning()
