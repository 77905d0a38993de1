"""The loop that most distillation code on CIFAR-10 has."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.classic_loop.reading import Reading
from benchmarks.classic_loop.transforms import PilImages
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData


class ClassicLoop:
    """PIL images in worker processes, float32, planes, the teacher in every step, numbers read in every step.

    Args:
        config: batch size, temperature, alpha and the learning rate of Adam.
        data: its training images, as they are stored, are all that is used of it.
        workers: processes that prepare the images.
    """

    def __init__(
        self, config: RunConfig, teacher: nn.Module, student: nn.Module, data: ImageData, workers: int
    ) -> None:
        images = PilImages(data.train.images.numpy(), data.train.labels.numpy(), data.info.mean, data.info.std)
        self._loader = DataLoader(images, config.student.batch_size, shuffle=True, num_workers=workers, drop_last=True)
        self._teacher, self._student = teacher, student
        self._optimizer = torch.optim.Adam(student.parameters(), lr=config.student.learning_rate)
        self._temperature, self._alpha = config.distillation.temperature, config.distillation.alpha

    def run(self, warm_up: int, steps: int) -> Reading:
        """Train for `warm_up` steps, until the workers are ahead as far as they get, then for `steps` timed ones."""
        self._student.train()
        batches = self._batches()
        for _ in range(warm_up):
            self._step(*next(batches))
        start, total = time.perf_counter(), 0.0
        for _ in range(steps):
            loss, _correct = self._step(*next(batches))
            total += loss
        seconds = time.perf_counter() - start
        batches.close()  # ends the workers: they would go on preparing while another loop is timed
        return Reading(seconds, total / steps)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self._loader

    def _step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        with torch.no_grad():
            teacher_logits = self._teacher(images)
        logits = self._student(images)
        loss = distillation_loss(logits, teacher_logits, labels, self._temperature, self._alpha)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item(), int((logits.argmax(1) == labels).sum().item())


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Of Hinton et al. (2015), as one writes it in PyTorch; logits (N, classes), labels (N,)."""
    softened = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
    )
    return alpha * temperature**2 * softened + (1 - alpha) * F.cross_entropy(logits, labels)
