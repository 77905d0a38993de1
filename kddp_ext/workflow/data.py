"""Images that stay in memory as bytes, and batches of them that depend on seed, epoch and index alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.datasets import DatasetInfo, RawDataset
from kddp_ext.workflow.errors import WorkflowError


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, S, S, C), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class ImageData:
    """A data set, split and resident on a device.

    Every random choice is a function of a seed, the epoch or view, and an image's index, never of what was
    drawn before: a run that was killed and resumed sees the same batches, and every stage sees the same views,
    so that a teacher's logits for one stage serve the next.

    Args:
        raw: the images as they were read.
        info: the data set's shape and statistics.
        config: `data_seed`, `validation` and `augment` count here.
        device: where the images stay.

    Raises:
        WorkflowError: `config.validation` leaves no image to train on.
    """

    def __init__(self, raw: RawDataset, info: DatasetInfo, config: RunConfig, device: torch.device) -> None:
        images, labels = torch.from_numpy(raw.train_images), torch.from_numpy(raw.train_labels)
        if config.validation >= len(labels):
            raise WorkflowError(f"--validation: expected fewer than the {len(labels)} images, got {config.validation}")
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.data_seed))
        held_out, kept = shuffled[: config.validation], shuffled[config.validation :]
        self.info = info
        self.seed = config.data_seed
        self.augment = config.augment
        self.device = device
        self.train = Split(images[kept].to(device), labels[kept].to(device))
        self.validation = Split(images[held_out].to(device), labels[held_out].to(device))
        self.test = Split(torch.from_numpy(raw.test_images).to(device), torch.from_numpy(raw.test_labels).to(device))
        # (x - mean) / std, as one multiplication and one addition in the type that the network reads.
        std = torch.tensor(info.std, device=device)
        self._scale = 1 / std
        self._shift = -torch.tensor(info.mean, device=device) / std

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Indices into the training split, in an order of (seed, epoch); the incomplete last batch is left out."""
        batch_size = min(batch_size, len(self.train))
        keys = random_bits(seed, _ORDER, epoch, torch.arange(len(self.train), device=self.device))
        for batch in keys.argsort(stable=True).split(batch_size):
            if len(batch) == batch_size:
                yield batch

    def training_images(self, indices: Tensor, view: int, shift: int) -> Tensor:
        """The view numbered `view` of the training images `indices`, as `normalise` returns them.

        Args:
            shift: the most pixels that an augmented image moves by in each direction, less than its side.
        """
        if not self.augment:
            return self.normalise(self.train.images[indices])
        return self.normalise(shift_and_flip(self.train.images, indices, self.seed, view, shift))

    def normalise(self, images: Tensor) -> Tensor:
        """Images of bytes, (N, S, S, C), as a network reads them: float32 (N, C, S, S), channels last."""
        return (images * self._scale + self._shift).permute(0, 3, 1, 2)

    def example(self, count: int = 1) -> Tensor:
        """`count` images as a network reads them, for tracing and measuring."""
        return self.normalise(self.train.images[:count])


def shift_and_flip(images: Tensor, indices: Tensor, seed: int, view: int, shift: int) -> Tensor:
    """Views of `images[indices]`, uint8 (N, S, S, C): moved by up to `shift` pixels and flipped.

    What moves in at a border is its mirror image. Each image is flipped in every other view, starting with
    either (Jordan's alternating flip), so that two views show both sides of it.
    """
    size = images.shape[1]
    bits = random_bits(seed, _SHIFT, view, indices)
    down = bits % (2 * shift + 1) - shift
    right = (bits >> 20) % (2 * shift + 1) - shift
    flip = (random_bits(seed, _FLIP, 0, indices) + view) % 2 == 1

    steps = torch.arange(size, device=images.device)
    rows = _mirror(steps + down[:, None], size)
    columns = _mirror(torch.where(flip[:, None], steps.flip(0), steps) + right[:, None], size)
    return images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_bits(seed: int, purpose: int, epoch: int, indices: Tensor) -> Tensor:
    """62 random bits for each index, int64 >= 0: a hash of all four arguments, the same on every device."""
    key = torch.full_like(indices, seed)
    for value in (purpose, epoch):
        key = _mix(key) + value
    return _mix(_mix(key) + indices) & (2**62 - 1)


# What the bits are for: different purposes get independent bits.
_ORDER, _SHIFT, _FLIP = 1, 2, 3


def _mix(x: Tensor) -> Tensor:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014), on wrapping 64-bit integers.
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)  # PyTorch's >> repeats the sign


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _mirror(positions: Tensor, size: int) -> Tensor:
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)
