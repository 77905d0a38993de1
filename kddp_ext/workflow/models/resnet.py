"""Pre-activation residual networks for small images (He, Zhang, Ren, Sun 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = 3


class PreActivationBlock(nn.Module):
    """Normalise, rectify, convolve, twice; added to what came in (He et al. 2016, figure 1b).

    Where sides or channels change, what came in goes through a 1x1 convolution of the first rectified values.
    The channels between the two convolutions are the block's own: they are what can be pruned of it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        rectified = torch.relu(self.norm1(features))
        kept = features if self.shortcut is None else self.shortcut(rectified)
        output: Tensor = kept + self.conv2(torch.relu(self.norm2(self.conv1(rectified))))
        return output


class PreActivationResNet(nn.Module):
    """A 3x3 convolution, three stages of blocks of which the later two halve the sides, a linear classifier.

    The layout for CIFAR of He et al. (2015, section 4.2), with the blocks of 2016; convolutions are initialised as
    in He et al. ("Delving deep into rectifiers", 2015).

    Args:
        image_channels: 1 for grey, 3 for colour images.
        classes: number of logits.
        depth: 6n + 2: layers with weights on the longest way through n blocks a stage.
        channels: of the three stages.
    """

    def __init__(self, image_channels: int, classes: int, depth: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image_channels, channels[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        inputs = channels[0]
        for stage, outputs in enumerate(channels):
            for number in range((depth - 2) // 6):
                blocks.append(PreActivationBlock(inputs, outputs, stride=2 if stage and number == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.blocks(self.conv(images))))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits
