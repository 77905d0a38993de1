"""The loss with the kernels of Liger Kernel (https://github.com/linkedin/Liger-Kernel), where it is installed.

What it has that is nearest to this package's loss are two of its parts. `LigerKLDIVLoss` is Σ p (log p − log q) of
probabilities p and logarithms log q that it is given, and `LigerCrossEntropyLoss` is the cross entropy of logits. So
the value is the same, but both softmaxes of the tempered logits, the L1 penalty and the sum of the gradients are
PyTorch's. The cross entropy leaves its gradient where the logits were; as this package changes no input, it is given a
copy. Both ask the device for a result (whether the incoming gradient is 1, how many labels are valid), which the host
waits for, and which cannot be captured in a CUDA graph. Read in version 0.8.5.

Not compared: `LigerFusedLinearJSD`, `LigerFusedLinearKLDivLoss` and the losses of `liger_kernel.chunked_loss` take
hidden states and the weights of the last layer, whose product they compute as well: another function.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Inputs, Loss
from benchmarks.formulas import ALPHA, L1_WEIGHT, TEMPERATURE


def loss() -> Loss:
    """The loss of `benchmarks.formulas` with the forward KL divergence.

    Raises:
        ImportError: Liger Kernel is not installed.
    """
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        LigerCrossEntropyLoss,
        LigerKLDIVLoss,
    )

    divergence, cross_entropy = LigerKLDIVLoss(reduction="batchmean"), LigerCrossEntropyLoss()

    def value(inputs: Inputs) -> Tensor:
        student, teacher, labels, activations = inputs
        log_q, p = F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
        total: Tensor = ALPHA * TEMPERATURE**2 * divergence(log_q, p)
        total = total + (1 - ALPHA) * cross_entropy(student.clone(), labels)
        for activation in activations:
            total = total + L1_WEIGHT * activation.abs().sum() / activation.shape[0]
        return total

    return value
