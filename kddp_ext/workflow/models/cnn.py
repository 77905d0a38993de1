"""The plain student: some convolutions and one hidden fully-connected layer."""

from __future__ import annotations

from torch import Tensor, nn


class PlainStudent(nn.Module):
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
