"""The scaling of gradients in the loss's backward; on a GPU one launch for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kddp_ext.ops.library import ELEMENT_TYPES, native, scales_natively


def scale_gradients(
    gradients: Sequence[Tensor], grad_loss: Tensor, factors: Sequence[Any] | None = None, *, in_place: bool = False
) -> Sequence[Tensor]:
    """Each gradient times `grad_loss` times its factor.

    Args:
        gradients: contiguous, as `kd_l1_loss` returns them.
        grad_loss: a 0-dim tensor on their device; a GPU's value is not read by the host.
        factors: one for each gradient; None stands for 1.
        in_place: overwrite the gradients and return them, unless `grad_loss` has many values (is_grads_batched); those
            that are scaled by 1 are skipped.

    Returns:
        One tensor for each gradient, of its shape and dtype.
    """
    batched = is_batched(grad_loss)
    in_place = in_place and not batched
    intercepted = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or batched
    if intercepted or not scales_natively(grad_loss.device):
        # The usual `loss.backward()` scales by 1. On the CPU the value can be read, which saves a pass over memory.
        if in_place and factors is None and grad_loss.is_cpu and grad_loss.item() == 1:
            return gradients
        scales = [grad_loss] * len(gradients) if factors is None else [grad_loss * factor for factor in factors]
        if in_place:
            return [gradient.mul_(scale) for gradient, scale in zip(gradients, scales, strict=True)]
        return [gradient * scale for gradient, scale in zip(gradients, scales, strict=True)]
    factors = [1.0] * len(gradients) if factors is None else factors
    targets = gradients if in_place else [torch.empty_like(gradient) for gradient in gradients]
    grad_loss = grad_loss.detach().to(torch.float64 if grad_loss.dtype == torch.float64 else torch.float32)
    module, place = native(grad_loss)
    module.scale(
        [
            (source.data_ptr(), target.data_ptr(), source.numel(), ELEMENT_TYPES[source.dtype], factor)
            for source, target, factor in zip(gradients, targets, factors, strict=True)
        ],
        grad_loss.data_ptr(),
        ELEMENT_TYPES[grad_loss.dtype],
        place,
    )
    return targets


def is_batched(grad_loss: Tensor) -> bool:
    """True under is_grads_batched and vmap, where `grad_loss` has many values."""
    functorch = torch._C._functorch
    return torch._C._are_functorch_transforms_active() or functorch.is_legacy_batchedtensor(grad_loss)
