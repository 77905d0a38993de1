"""`kddp predict`: what a student sees in image files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from kddp_ext.workflow.config import Device
from kddp_ext.workflow.data import normalise, scale_and_shift
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.image_files import find_images
from kddp_ext.workflow.image_folder import decoded_or_reason
from kddp_ext.workflow.networks import logits_of
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.saved_models import read_student

_BATCH = 128


@torch.no_grad()
def predict(path: Path, images: Sequence[str], device: Device, student: str = "", as_json: bool = False) -> None:
    """Print a line for each image: its path, class and probability, separated by tabs, or as a JSON object.

    Args:
        path: the student's file.
        images: files and folders; "-" reads their paths from standard input, one a line.
        student: MODULE:FUNCTION for a student of the user's own.

    Raises:
        WorkflowError: the file is no student, or, after the other images, some cannot be read.
    """
    saved = read_student(path)
    info, runtime = saved.info, Runtime(device, "float32")
    model = runtime.place(saved.load({"student": student})).eval()
    scale, shift = scale_and_shift(info, runtime.device)
    failed: list[str] = []

    read = partial(decoded_or_reason, size=info.size, channels=info.channels)
    files = _files(images)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while chunk := list(islice(files, _BATCH)):
            decoded = list(zip(chunk, threads.map(read, chunk), strict=True))
            failed += [each for _, each in decoded if isinstance(each, str)]
            readable = [(file, each) for file, each in decoded if not isinstance(each, str)]
            if not readable:
                continue
            batch = torch.from_numpy(np.stack([pixels for _, pixels in readable])).to(runtime.device)
            highest = logits_of(model(normalise(batch, scale, shift))).float().softmax(1).max(1)
            for (file, _), probability, label in zip(readable, *(each.tolist() for each in highest), strict=True):
                name = info.class_names[label]
                values = {"path": str(file), "class": name, "probability": round(probability, 4)}
                # Rich would replace the tabs by spaces.
                print(json.dumps(values) if as_json else f"{file}\t{name}\t{probability:.4f}")
    if failed:
        more = f" (and {len(failed) - 1} more images)" if failed[1:] else ""
        raise WorkflowError(f"{failed[0]}{more}")


def _files(images: Sequence[str]) -> Iterator[Path]:
    for name in images:
        if name == "-":
            yield from (Path(line) for line in sys.stdin.read().splitlines() if line)
        elif Path(name).is_dir():
            found = find_images(Path(name))
            if not found:
                raise WorkflowError(f"{name}: expected a folder with PNG, JPEG or WebP images, found none")
            yield from found
        else:
            yield Path(name)
