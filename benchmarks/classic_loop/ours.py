"""The workflow's training, `train_epoch` of kddp_ext/workflow/train.py, for a given number of steps."""

from __future__ import annotations

import time
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import kddp_ext
from benchmarks.classic_loop.pairs import Reading
from benchmarks.disturbance import Watch
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.train import student_recipe


class OurLoop:
    """Images in memory as bytes, augmented a batch at a time, channels last, in bfloat16 if the processor supports it.

    Args:
        config: the config of the run; the student is trained as in the stage kd.
        teacher: runs in every step, in the runtime's precision, unless `logits` is given.
        logits: a file with the teacher's logits of one epoch, in the format of the workflow's cache.
        runtime: device and precision.
    """

    def __init__(
        self,
        config: RunConfig,
        teacher: nn.Module,
        student: nn.Module,
        data: ImageData,
        logits: Path | None,
        runtime: Runtime,
    ) -> None:
        self._recipe = student_recipe(config, "kd")
        self._teacher, self._student = runtime.place(teacher), runtime.place(student)
        (self._optimizer,) = self._recipe.optimizers(student)  # Adam alone
        self._data, self._logits, self._runtime = data, logits, runtime
        self._epoch = 0

    def run(self, warm_up: int, steps: int) -> Reading:
        """Train for `warm_up` steps, then for `steps` timed ones, which include the start of an epoch."""
        self.train(warm_up)
        watch = Watch(torch.get_num_threads())
        with watch.interruptions():
            start = time.perf_counter()
            loss = self.train(steps)
            seconds = time.perf_counter() - start
        return Reading(seconds, loss, watch.disturbed)

    def train(self, steps: int) -> float:
        """Train for `steps` steps, over several epochs if necessary; returns their mean loss."""
        total, left = 0.0, steps
        while left > 0:
            done, loss = self._train_epoch(left)
            left -= done
            total += loss
        return total / max(steps, 1)

    def _train_epoch(self, most: int) -> tuple[int, float]:
        batches = list(self._data.batches(self._epoch, self._recipe.batch_size, self._recipe.seed))
        cached = None if self._logits is None else safetensors.torch.load_file(self._logits)["logits"]
        self._student.train()
        sums = torch.zeros(5, dtype=torch.float64, device=self._runtime.device)
        for step, indices in enumerate(batches[:most]):
            learning_rate = self._recipe.learning_rate((self._epoch + step / len(batches)) / self._recipe.epochs)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            sums += self._step(indices, cached)
        self._epoch = (self._epoch + 1) % self._recipe.epochs
        return min(most, len(batches)), float(sums[0])

    def _step(self, indices: Tensor, cached: Tensor | None) -> Tensor:
        recipe = self._recipe
        view = recipe.view(self._epoch)
        images, labels = self._data.training_images(indices, view, recipe.shift), self._data.train.labels[indices]
        teacher_logits = self._ask_teacher(images) if cached is None else cached[indices]
        with self._runtime.autocast():
            logits = self._student(images)
        loss, terms = kddp_ext.fused_kd_l1_loss(
            logits,
            teacher_logits,
            labels,
            (),
            return_terms=True,
            **vars(recipe.loss),
        )
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return torch.stack([loss.detach(), terms.kd, terms.ce, terms.l1, terms.correct])

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor) -> Tensor:
        with self._runtime.autocast():
            logits: Tensor = self._teacher(images)
        return logits.float()
