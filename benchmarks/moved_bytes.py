"""What a comparison with the memory's speed needs: the bytes of a loss, and those that a copy moves in a second."""

from __future__ import annotations

import torch
from torch.utils.benchmark import Timer

from benchmarks.cases import Shape
from benchmarks.settings import Settings

COPY_BYTES = 256 << 20  # of each array: many times the caches
COPY_REPETITIONS = 9


def needed_bytes(shape: Shape) -> int:
    """What a step has to move: each logit read once and each gradient written once; the same of the activations.

    Three arrays of logits (student, teacher, gradient) and two of activations (value, gradient). Labels, and the
    lines of a target that a processor reads before it writes them, are not counted.
    """
    return (3 * shape.rows * shape.classes + 2 * shape.rows * shape.neurons) * shape.dtype.itemsize


def gradient_bytes(shape: Shape) -> int:
    """What a step returns: the gradients of the student's logits and of the activations."""
    return shape.rows * (shape.classes + shape.neurons) * shape.dtype.itemsize


def copy_bandwidth(settings: Settings) -> float:
    """Bytes a second of `target.copy_(source)`, read and written ones both counted; the best of several."""
    elements = (1 << 16 if settings.smoke else COPY_BYTES) // 4
    source, target = torch.ones(2, elements).unbind()
    timer = Timer("target.copy_(source)", globals={"source": source, "target": target}, num_threads=settings.threads)
    timer.timeit(1)
    return 2 * source.nbytes / min(timer.timeit(1).median for _ in range(COPY_REPETITIONS))
