"""The loop of most distillation code on CIFAR-10: PIL images one at a time, float32, the teacher in every step."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.classic_loop.pairs import Reading
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.data import ImageData

SIZE, PADDING = 32, 4


def random_crop(image: Image.Image) -> Image.Image:
    """A random part of 32x32 pixels of the image, padded with four black pixels on each side."""
    padded = ImageOps.expand(image, border=PADDING, fill=0)
    left, top = (int(torch.randint(0, 2 * PADDING + 1, ())) for _ in range(2))
    return padded.crop((left, top, left + SIZE, top + SIZE))


def random_flip(image: Image.Image) -> Image.Image:
    """The image or its mirror image, with equal probability."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if float(torch.rand(())) < 0.5 else image


def to_tensor(image: Image.Image) -> Tensor:
    """float32 (3, 32, 32), from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images with the augmentation that is usual since He et al. (2016), normalised, and their labels.

    Args:
        images: uint8 (N, 32, 32, 3).
        labels: int64 (N,).
        mean, std: per channel, in units of a byte.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self._images = images
        self._labels = labels.tolist()
        self._mean, self._std = (torch.tensor(values)[:, None, None] / 255 for values in (mean, std))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = random_flip(random_crop(Image.fromarray(self._images[index])))
        return self.normalise(to_tensor(image)), self._labels[index]

    def normalise(self, image: Tensor) -> Tensor:
        """Normalise `image` (3, 32, 32) in place with the mean and the standard deviation of each channel."""
        return image.sub_(self._mean).div_(self._std)


class ClassicLoop:
    """PIL images from worker processes, float32, NCHW, the teacher in every step, loss and accuracy read in every step.

    Args:
        config: batch size, temperature, alpha and the learning rate of Adam.
        data: only its stored training images are used.
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
        """Train for `warm_up` steps, in which the workers get ahead, then for `steps` timed ones."""
        self._student.train()
        batches = self._batches()
        for _ in range(warm_up):
            self._step(*next(batches))
        start, total = time.perf_counter(), 0.0
        for _ in range(steps):
            loss, _correct = self._step(*next(batches))
            total += loss
        seconds = time.perf_counter() - start
        batches.close()  # ends the workers, which would disturb the other loops
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
    """The loss of Hinton et al. (2015) in PyTorch's functions; logits (N, classes), labels (N,)."""
    softened = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
    )
    return alpha * temperature**2 * softened + (1 - alpha) * F.cross_entropy(logits, labels)
