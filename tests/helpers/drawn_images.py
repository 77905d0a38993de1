"""Small folders of images: two classes, dark and bright, that a network learns in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("bright", "dark")


def draw_images(folder: Path, count: int = 8, suffix: str = "png", colour: bool = True) -> Path:
    """Write `count` images of different sizes for each class into folder/CLASS; returns the folder."""
    random = np.random.default_rng(0)
    for name, level in zip(CLASSES, (200, 60), strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = (10 + number, 14, 3)[: 3 if colour else 2]
            pixels = random.normal(level, 20, shape).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.{suffix}")
    return folder
