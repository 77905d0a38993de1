"""A data set in memory: its split, batches, normalisation and augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.datasets import DatasetInfo, RawDataset
from kddp_ext.workflow.errors import OptionError


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, S, S, C), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class ImageData:
    """A data set, split into training, validation and test images, on a device.

    Every random choice is a function of a seed, of the epoch or view, and of the image's index, never of earlier
    choices. A resumed run therefore sees the same batches, and all stages see the same views, so that the teacher's
    logits of one stage serve the others.

    The device holds the images as bytes. Of `config`, `data_seed`, `validation` and `augment` are used; raises
    WorkflowError if `validation` leaves no image to train on.
    """

    def __init__(self, raw: RawDataset, info: DatasetInfo, config: RunConfig, device: torch.device) -> None:
        images, labels = torch.from_numpy(raw.train_images), torch.from_numpy(raw.train_labels)
        test_images, test_labels = torch.from_numpy(raw.test_images), torch.from_numpy(raw.test_labels)
        rows = torch.arange(len(labels)) if raw.train_rows is None else torch.from_numpy(raw.train_rows)
        if config.validation >= len(rows):
            raise OptionError("validation", f"fewer than the {len(rows)} images", config.validation)
        shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.data_seed))]
        validation, train = shuffled[: config.validation], shuffled[config.validation :]
        if raw.validation_rows is not None:
            validation = torch.cat([validation, torch.from_numpy(raw.validation_rows)])
        if raw.test_rows is not None:
            test = torch.from_numpy(raw.test_rows)
            test_images, test_labels = test_images[test], test_labels[test]
        self.info = info
        self.seed = config.data_seed
        self.augment = config.augment
        self.device = device
        self.train = Split(images[train].to(device), labels[train].to(device))
        self.validation = Split(images[validation].to(device), labels[validation].to(device))
        self.test = Split(test_images.to(device), test_labels.to(device))
        self._scale, self._shift = scale_and_shift(info, device)

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Indices into the training split, shuffled by (seed, epoch). An incomplete last batch is dropped."""
        batch_size = min(batch_size, len(self.train))
        keys = random_bits(seed, _ORDER, epoch, torch.arange(len(self.train), device=self.device))
        for batch in keys.argsort(stable=True).split(batch_size):
            if len(batch) == batch_size:
                yield batch

    def training_images(self, indices: Tensor, view: int, shift: int) -> Tensor:
        """The training images `indices` as `normalise` returns them, augmented if the config says so.

        The view with the number `view` is always the same; it moves an image by at most `shift` pixels, less than its
        side, in each direction.
        """
        if not self.augment:
            return self.normalise(self.train.images[indices])
        return self.normalise(shift_and_flip(self.train.images, indices, self.seed, view, shift, self.info.flips))

    def normalise(self, images: Tensor) -> Tensor:
        """`normalise` by this data set."""
        return normalise(images, self._scale, self._shift)

    def example(self, count: int = 1) -> Tensor:
        """The first `count` training images, normalised, for tracing and measuring."""
        return self.normalise(self.train.images[:count])


def scale_and_shift(info: DatasetInfo, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `normalise` needs, both (C,): (x - mean) / std as one multiplication and one addition."""
    mean, std = (torch.tensor(values, device=device) for values in (info.mean, info.std))
    return 1 / std, -mean / std


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise images, uint8 (N, S, S, C), to the networks' input: float32 (N, C, S, S), channels last."""
    return (images * scale + shift).permute(0, 3, 1, 2)


def shift_and_flip(images: Tensor, indices: Tensor, seed: int, view: int, shift: int, flips: bool) -> Tensor:
    """Views of `images[indices]`, uint8 (N, S, S, C), moved by up to `shift` pixels. Borders are mirrored.

    If `flips` is set, each image is flipped in every other view, beginning at random (the alternating flip of Jordan
    2024), so that two consecutive views show both sides of it.
    """
    size = images.shape[1]
    bits = random_bits(seed, _SHIFT, view, indices)
    down = bits % (2 * shift + 1) - shift
    right = (bits >> 20) % (2 * shift + 1) - shift
    steps = torch.arange(size, device=images.device)
    rows = _mirror(steps + down[:, None], size)
    if flips:
        flip = (random_bits(seed, _FLIP, 0, indices) + view) % 2 == 1
        steps = torch.where(flip[:, None], steps.flip(0), steps)
    columns = _mirror(steps + right[:, None], size)
    return images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_bits(seed: int, purpose: int, epoch: int, indices: Tensor) -> Tensor:
    """A hash of all four arguments for each index: 62 bits, int64 >= 0, the same on every device."""
    key = torch.full_like(indices, seed)
    for value in (purpose, epoch):
        key = _mix(key) + value
    return _mix(_mix(key) + indices) & (2**62 - 1)


# Purposes of random bits. Different purposes have independent bits.
_ORDER, _SHIFT, _FLIP = 1, 2, 3


def _mix(x: Tensor) -> Tensor:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014), on wrapping 64-bit integers.
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)  # PyTorch's >> extends the sign


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _mirror(positions: Tensor, size: int) -> Tensor:
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)
