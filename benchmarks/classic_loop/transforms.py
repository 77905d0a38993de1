"""One PIL image at a time: the augmentation of CIFAR-10 that is usual since He et al. (2016)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

SIZE, PADDING = 32, 4


def random_crop(image: Image.Image) -> Image.Image:
    """A part of 32x32 pixels of the image with four black pixels around it."""
    padded = ImageOps.expand(image, border=PADDING, fill=0)
    left, top = (int(torch.randint(0, 2 * PADDING + 1, ())) for _ in range(2))
    return padded.crop((left, top, left + SIZE, top + SIZE))


def random_flip(image: Image.Image) -> Image.Image:
    """The image or its mirror image, with equal chances."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if float(torch.rand(())) < 0.5 else image


def to_tensor(image: Image.Image) -> Tensor:
    """float32 (3, 32, 32), 0 to 1, planes one after the other."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


class PilImages(Dataset[tuple[Tensor, int]]):
    """Augmented, normalised images and their labels.

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
        """`image` (3, 32, 32), changed in place, with the mean 0 and the standard deviation 1 in each channel."""
        return image.sub_(self._mean).div_(self._std)
