"""`gradient_products`, the sums of activations times their gradients by sample and entry, as an operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kddp_ext.ops import reference
from kddp_ext.ops.library import ELEMENT_TYPES, is_native, library, native, needs_no_dispatcher, register

library.define(
    "gradient_products(Tensor activation, Tensor gradient, Tensor? mean, int axis, SymInt samples) -> Tensor"
)


def _empty_products(activation: Tensor, gradient: Tensor, mean: Tensor | None, axis: int, samples: int) -> Tensor:
    """The output of the operator, not filled yet."""
    _check(activation, gradient, mean, axis, samples)
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    return activation.new_empty((samples, activation.shape[axis]), dtype=dtype)


def _gradient_products(activation: Tensor, gradient: Tensor, mean: Tensor | None, axis: int, samples: int) -> Tensor:
    products = _empty_products(activation, gradient, mean, axis, samples)
    if not activation.is_contiguous() and activation.movedim(axis, -1).is_contiguous():  # channels_last
        activation, gradient = activation.movedim(axis, -1), gradient.movedim(axis, -1)
        axis = activation.dim() - 1
    # These names keep copies alive while the kernel uses their addresses.
    activation, gradient = activation.contiguous(), gradient.contiguous()
    mean = None if mean is None else mean.contiguous()
    module, place = native(activation)
    module.gradient_products(
        activation.data_ptr(),
        gradient.data_ptr(),
        ELEMENT_TYPES[activation.dtype],
        0 if mean is None else mean.data_ptr(),
        products.data_ptr(),
        samples,
        math.prod(activation.shape[:axis]) // max(samples, 1),
        activation.shape[axis],
        math.prod(activation.shape[axis + 1 :]),
        place,
    )
    return products


_gradient_products_operator = register("gradient_products", _gradient_products, _empty_products)


def gradient_products(
    activation: Tensor, gradient: Tensor, mean: Tensor | None = None, *, axis: int, samples: int
) -> Tensor:
    """Sum (activation - mean) · gradient for each sample and entry, in one pass over both tensors.

    With the gradient of a sample's loss, the negative sum is the first-order change of that loss when the entry is set
    to its mean: the Taylor criterion of Molchanov et al. 2017 (arXiv:1611.06440, equation 8). The squares, summed over
    the samples, are the Fisher criterion of Theis et al. 2018 (arXiv:1801.05787).

    Args:
        activation: at least 2 dimensions, of float32, float64, bfloat16 or float16. A tensor that is neither contiguous
            nor becomes so when `axis` is moved to the end, as channels_last does, is copied.
        gradient: of the shape, dtype and device of the activation; it is copied if its strides differ.
        mean: (E,) float64, subtracted from the entries; None stands for 0. It is rounded to the dtype of the result.
        axis: the dimension of the E entries, at least 1. All others are summed.
        samples: number N of samples. Dimension 0 has a multiple of N rows, with the rows of each sample adjacent.

    Returns:
        (N, E) float32, or float64 for float64 tensors, without autograd. The error is at most about that of the formula
        in PyTorch, and the sum does not depend on the number of threads. NaN and infinity follow IEEE 754.

    Raises:
        ValueError: an argument is not as described.
    """
    if not is_native(activation.device):
        _check(activation, gradient, mean, axis, samples)
        return reference.gradient_products(activation.detach(), gradient.detach(), mean, axis=axis, samples=samples)
    if needs_no_dispatcher((activation, gradient, mean)):
        return _gradient_products(activation.detach(), gradient.detach(), mean, axis, samples)
    products: Tensor = _gradient_products_operator(activation.detach(), gradient.detach(), mean, axis, samples)
    return products


def _check(activation: Tensor, gradient: Tensor, mean: Tensor | None, axis: int, samples: int) -> None:
    shape = tuple(activation.shape)
    if activation.dtype not in ELEMENT_TYPES:
        names = ", ".join(str(dtype) for dtype in ELEMENT_TYPES)
        raise ValueError(f"activation: expected one of {names}, got {activation.dtype}")
    if not 1 <= axis < len(shape):
        raise ValueError(
            f"axis: expected a dimension of the activation from 1 on, got {axis} for an activation of shape {shape}"
        )
    if gradient.shape != activation.shape or gradient.dtype != activation.dtype or gradient.device != activation.device:
        raise ValueError(
            f"gradient: expected {activation.dtype} of shape {shape} on {activation.device} as the activation, got "
            f"{gradient.dtype} of shape {tuple(gradient.shape)} on {gradient.device}"
        )
    if samples < 0 or (shape[0] % samples if samples else shape[0]):
        raise ValueError(f"samples: expected a divisor of the {shape[0]} rows of the activation, got {samples}")
    if mean is not None and (
        mean.dtype != torch.float64 or mean.shape != shape[axis : axis + 1] or mean.device != activation.device
    ):
        raise ValueError(
            f"mean: expected a vector of {shape[axis]} float64 on {activation.device}, got {mean.dtype} of shape "
            f"{tuple(mean.shape)} on {mean.device}"
        )
