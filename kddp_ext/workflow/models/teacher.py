"""The fast teacher: a convolutional network that trains in few passes."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Two 3x3 convolutions; the first one's output is pooled to half the sides before it is normalised.

    The convolutions start as identities as far as they have inputs, and the normalisations have no scale to learn:
    both let a network this shallow learn in fewer passes (Jordan 2024, Page 2018).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _started_as_identity(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)),
            nn.MaxPool2d(2),
            _without_scale(nn.BatchNorm2d(outputs, momentum=_NORM_MOMENTUM)),
            nn.GELU(),
            _started_as_identity(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)),
            _without_scale(nn.BatchNorm2d(outputs, momentum=_NORM_MOMENTUM)),
            nn.GELU(),
        )

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.layers(features)
        return output


# Running statistics follow the last few batches: in few passes, older ones are of another network.
_NORM_MOMENTUM = 0.4


@torch.no_grad()
def _started_as_identity(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return convolution


def _without_scale(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.weight.requires_grad_(False)
    return norm


class FastTeacher(nn.Module):
    """A convolutional network that trains in few passes.

    Of the family that David Page ("How to train your ResNet", 2018) and Keller Jordan ("94% on CIFAR-10 in
    3.29 seconds on a single GPU", 2024) made fast: wide, shallow, pooling before normalising, a global
    maximum before the classifier, whose logits are scaled down so that a large learning rate is stable. The
    weights of its first layer are not trained: they decorrelate the 2x2 patches of the images (`whiten`), which
    saves passes.

    Args:
        image_channels: 1 for grey, 3 for colour images.
        classes: number of logits.
        channels: output channels of each block; a block halves the sides.
    """

    logit_scale = 1 / 9
    # A tenth of a step's time is the way back to this bias, which soon has its place (Jordan 2024).
    frozen_from: ClassVar[dict[str, int]] = {"whitening.bias": 3}

    def __init__(self, image_channels: int, classes: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        patch = 4 * image_channels
        self.whitening = nn.Conv2d(image_channels, 2 * patch, 2)
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(cast(Tensor, self.whitening.bias))
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
        features = self.blocks(nn.functional.gelu(self.whitening(images)))
        logits: Tensor = self.classifier(features.amax(dim=(2, 3))) * self.logit_scale
        return logits
