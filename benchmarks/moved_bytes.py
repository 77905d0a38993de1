"""The bytes that a loss must move, and the bandwidth of a copy."""

from __future__ import annotations

import torch
from torch.utils.benchmark import Timer

from benchmarks.cases import Shape
from benchmarks.settings import Settings

COPY_BYTES = 256 << 20  # of each array: many times the caches
COPY_REPETITIONS = 9


def needed_bytes(shape: Shape) -> int:
    """The bytes that a step must move: each value read once and each gradient written once.

    These are three arrays of logits (student, teacher, gradient) and two of activations (value, gradient), and a fourth
    of logits for labels that are probabilities. Logits of rows that are padding need not be read. Other labels are not
    counted, nor the lines that a processor reads before it overwrites them.
    """
    arrays = {"classes": 3, "confident": 3, "probabilities": 4, "padding": 2}[shape.labels]
    return (arrays * shape.rows * shape.classes + 2 * shape.rows * shape.neurons) * shape.dtype.itemsize


def gradient_bytes(shape: Shape) -> int:
    """The bytes of the gradients of the student's logits and of the activations."""
    return shape.rows * (shape.classes + shape.neurons) * shape.dtype.itemsize


def copy_bandwidth(settings: Settings) -> float:
    """Bytes a second, read and written, of `target.copy_(source)`; the best of several."""
    elements = (1 << 16 if settings.smoke else COPY_BYTES) // 4
    source, target = torch.ones(2, elements).unbind()
    timer = Timer("target.copy_(source)", globals={"source": source, "target": target}, num_threads=settings.threads)
    timer.timeit(1)
    return 2 * source.nbytes / min(timer.timeit(1).median for _ in range(COPY_REPETITIONS))
