"""The data sets of the workflow: what they hold, and one function that reads any of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kddp_ext.workflow.config import Dataset


@dataclass(frozen=True)
class DatasetInfo:
    """What a model and its input need to know of a data set.

    Attributes:
        name: as a person writes it.
        size: side of the square images in pixels.
        channels: 1 for grey, 3 for colour.
        classes: number of classes.
        mean, std: of the training pixels, per channel, in units of a byte (0 to 255).
    """

    name: str
    size: int
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class RawDataset:
    """Images as they are stored, uint8 (N, size, size, channels), and labels, int64 (N,)."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


INFO: dict[Dataset, DatasetInfo] = {
    "digits": DatasetInfo("digits", 8, 1, 10, (77.8,), (95.9,)),
    "fashion-mnist": DatasetInfo("Fashion-MNIST", 28, 1, 10, (72.9,), (90.0,)),
    "cifar10": DatasetInfo("CIFAR-10", 32, 3, 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
}


def read_dataset(dataset: Dataset, data_dir: Path | None) -> RawDataset:
    """Read a data set, from `data_dir` where it is given, else from the cache, downloading it the first time.

    Raises:
        DataFileError: a file is missing, truncated or not what it should be.
        WorkflowError: the download failed.
    """
    # Imported here: scikit-learn alone takes a second to load, and a run needs only one of the three.
    if dataset == "digits":
        from kddp_ext.workflow.datasets.digits import read_digits

        return read_digits()
    if dataset == "fashion-mnist":
        from kddp_ext.workflow.datasets.fashion_mnist import read_fashion_mnist

        return read_fashion_mnist(data_dir)
    from kddp_ext.workflow.datasets.cifar10 import read_cifar10

    return read_cifar10(data_dir)
