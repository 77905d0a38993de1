"""VGG-11 with batch normalisation, for small images."""

from __future__ import annotations

from torch import Tensor, nn

# Configuration A of Simonyan and Zisserman (2015): after which of its eight convolutions a pooling follows.
_POOLED = (0, 1, 3, 5, 7)
CONVOLUTIONS = 8


class VGG11(nn.Module):
    """Eight 3x3 convolutions, one hidden fully-connected layer, a linear classifier.

    Configuration A of Simonyan and Zisserman (2015) with batch normalisation, as it is used on images of 32x32: one
    hidden layer instead of two, and of the poolings as many as the image has sides for.

    Args:
        image_channels: 1 for grey, 3 for colour images.
        image_size: side of the square images in pixels, at least 2.
        classes: number of logits.
        channels: output channels of the eight convolutions.
        width: neurons of the hidden layer.
    """

    def __init__(
        self, image_channels: int, image_size: int, classes: int, channels: tuple[int, ...], width: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side, inputs = image_size, image_channels
        for number, outputs in enumerate(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if number in _POOLED and side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            inputs = outputs
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Linear(inputs * side * side, width)
        self.activation = nn.ReLU()
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.activation(self.hidden(self.features(images))))
        return logits
