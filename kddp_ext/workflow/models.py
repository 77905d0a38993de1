"""The networks of the workflow. Both take normalised images (N, C, S, S) and return logits (N, classes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.errors import WorkflowError

Model = TypeVar("Model", bound=nn.Module)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions; the first one's output is pooled to half the sides before it is normalised."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.layers(features)
        return output


class Teacher(nn.Module):
    """A convolutional network that trains in few passes.

    Of the family that David Page ("How to train your ResNet", 2018) and Keller Jordan ("94% on CIFAR-10 in
    3.29 seconds on a single GPU", 2024) made fast: wide, shallow, pooling before normalising, a global
    maximum before the classifier, whose logits are scaled down so that a large learning rate is stable. Its
    first layer is not trained: it decorrelates the 2x2 patches of the images (`whiten`), which saves passes.

    Args:
        image_channels: 1 for grey, 3 for colour images.
        classes: number of logits.
        channels: output channels of each block; a block halves the sides.
    """

    logit_scale = 0.125

    def __init__(self, image_channels: int, classes: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        patch = 4 * image_channels
        self.whitening = nn.Conv2d(image_channels, 2 * patch, 2, bias=False).requires_grad_(False)
        widths = (2 * patch, *channels)
        self.blocks = nn.Sequential(*(ConvBlock(a, b) for a, b in zip(widths, channels, strict=False)))
        self.classifier = nn.Linear(channels[-1], classes, bias=False)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first layer to the patches' principal components, at variance 1, and their negatives.

        Args:
            images: normalised training images (N, C, S, S); a few thousand are enough.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        variances, components = torch.linalg.eigh(patches.double().T.cov())
        # The constant keeps components that hardly vary from being blown up.
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(torch.relu(self.whitening(images)))
        logits: Tensor = self.classifier(features.amax(dim=(2, 3))) * self.logit_scale
        return logits


class Student(nn.Module):
    """A plain convolutional network with one hidden fully-connected layer, the one that KDDP prunes.

    With three convolutions it is `cnn5`: five layers with weights, the closest public analogue of the
    students of the KDDP paper (whose own could not be read).

    Args:
        image_channels: 1 for grey, 3 for colour images.
        image_size: side of the square images in pixels.
        classes: number of logits.
        channels: output channels of each convolution; each is followed by 2x2 pooling.
        width: neurons of the hidden layer.
    """

    def __init__(
        self, image_channels: int, image_size: int, classes: int, channels: tuple[int, ...], width: int
    ) -> None:
        super().__init__()
        sides = image_size // 2 ** len(channels)
        layers: list[nn.Module] = []
        for inputs, outputs in zip((image_channels, *channels), channels, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Linear(channels[-1] * sides * sides, width)
        self.activation = nn.ReLU()
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.activation(self.hidden(self.features(images))))
        return logits


def check_depth(config: RunConfig, info: DatasetInfo) -> None:
    """Raise WorkflowError where a network of `config` halves the images more often than they have pixels for."""
    networks = {
        # The whitening of 2x2 patches takes a pixel before the first block.
        "teacher": (len(config.teacher.channels), info.size - 1),
        "student": (len(config.student.channels), info.size),
    }
    for network, (poolings, size) in networks.items():
        if size >> poolings == 0:
            raise WorkflowError(
                f"--{network}.channels: {poolings} poolings leave nothing of the {info.size}x{info.size} images"
            )


def build_teacher(config: RunConfig, info: DatasetInfo, seed: int = 0) -> Teacher:
    """The teacher of a run, with the initial weights that `seed` gives."""
    return _seeded(seed, lambda: Teacher(info.channels, info.classes, config.teacher.channels))


def build_student(config: RunConfig, info: DatasetInfo, seed: int = 0) -> Student:
    """The student of a run at its full width, with the initial weights that `seed` gives."""
    student = config.student
    return _seeded(seed, lambda: Student(info.channels, info.size, info.classes, student.channels, student.width))


def _seeded(seed: int, build: Callable[[], Model]) -> Model:
    # The caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
