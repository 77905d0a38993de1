"""Digits: 1797 scanned digits of 8x8 pixels that ship with scikit-learn (from the UCI repository)."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from kddp_ext.workflow.datasets import RawDataset

# A third: with fewer test images one image weighs more than the differences that a report is about.
_TEST_IMAGES = 597


def read_digits() -> RawDataset:
    """The digits with a fixed test set, the same for every seed."""
    images, labels = load_digits(return_X_y=True)
    # Stored as 0 to 16; spread over the range of a byte like every other data set.
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:_TEST_IMAGES], order[_TEST_IMAGES:]
    return RawDataset(pixels[train], labels[train], pixels[test], labels[test])
