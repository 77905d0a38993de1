"""The loss by Liger Kernel (https://github.com/linkedin/Liger-Kernel), if it is installed.

Liger has two parts of this package's loss: `LigerKLDIVLoss` is Σ p (log p − log q) of given p and log q, and
`LigerCrossEntropyLoss` is the cross entropy of logits. The value is the same, but PyTorch computes both softmaxes, the
L1 penalty and the sum of the gradients. The cross entropy overwrites its logits by their gradient, so it gets a copy.
Both parts wait for a result of the device (whether the incoming gradient is 1, how many labels are valid), which a CUDA
graph cannot capture. This describes version 0.8.5.

`LigerFusedLinearJSD`, `LigerFusedLinearKLDivLoss` and the losses of `liger_kernel.chunked_loss` are not compared: they
also compute the product of hidden states and the weights of the last layer.
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
