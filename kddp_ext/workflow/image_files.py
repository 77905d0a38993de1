"""Finds image files. It imports nothing large, because the command line counts a folder's images for its presets."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_images(folder: Path) -> list[Path]:
    """The PNG, JPEG and WebP files in `folder` and below, sorted; hidden files and folders are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if name.lower().endswith(SUFFIXES) and name[0] != "."]
    return found
