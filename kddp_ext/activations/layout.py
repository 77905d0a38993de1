"""Activations of any shape as the matrices that the kernels read."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class NeuronMatrix(NamedTuple):
    """An activation as a matrix, of which entry (o · neurons + j) · inner + i of a row belongs to neuron j.

    Attributes:
        values: (rows, outer · neurons · inner).
        samples: how many values there are of each neuron.
        outer: how often all neurons come in a row, one after the other.
        inner: entries of a neuron side by side.
    """

    values: Tensor
    samples: int
    outer: int = 1
    inner: int = 1


def as_matrix(activation: Tensor, axis: int = 1, *, keep_positions: bool = False) -> NeuronMatrix:
    """See an activation as a matrix, without a copy where its memory allows that.

    Args:
        activation: of at least 2 dimensions.
        axis: the dimension that the neurons are, counted from the last where it is negative; all others are samples
            and positions.
        keep_positions: whether the entries of dimensions behind the first must stay apart, in their order.
    """
    if axis < 0:
        axis += activation.dim()
    if activation.dim() == 2 and axis == 1:
        return NeuronMatrix(activation, activation.shape[0])
    shape = activation.shape
    samples = math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])
    outer, inner = math.prod(shape[1:axis]), math.prod(shape[axis + 1 :])
    by_neuron = activation.movedim(axis, -1)
    if axis > 0 and (keep_positions or (activation.is_contiguous() and not by_neuron.is_contiguous())):
        return NeuronMatrix(activation.flatten(1), samples, outer, inner)
    return NeuronMatrix(by_neuron.flatten(0, -2), samples)
