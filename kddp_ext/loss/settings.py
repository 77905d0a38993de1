"""The settings of the loss, which check themselves."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeGuard, get_args

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "dkd", "skew_kl", "skew_reverse_kl", "symmetric_kl"]
Reduction = Literal["mean", "sum", "none"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
# The numbers in csrc/include/kddp/kd_l1_loss.h. The divergences that are not named here are mixtures.
_KERNEL_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "dkd": 3, "symmetric_kl": 4}
_MIXTURE = 2
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


class LossOptions(TypedDict, total=False):
    """The fields of `LossSettings` as keyword arguments."""

    temperature: float | Tensor
    alpha: float | Tensor
    l1_weight: float | Tensor | Sequence[float | Tensor]
    label_smoothing: float
    ignore_index: int
    divergence: Divergence
    jsd_beta: float
    skew: float
    dkd_target_weight: float
    dkd_non_target_weight: float
    standardize_logits: bool
    class_dim: int
    reduction: Reduction
    normalizer: float | Tensor | None
    class_weights: Tensor | None


@dataclass(frozen=True)
class LossSettings:
    """The settings of `fused_kd_l1_loss`.

    temperature, alpha, l1_weight and normalizer may be numbers or 0-dim tensors, so that a schedule can change them.
    Each call reads the value of a tensor; on a GPU this waits for the device, so prefer numbers or CPU tensors.

    Attributes:
        temperature: T; both logits are divided by it. The default 4 is Hinton's choice for images of few classes.
        alpha: weight of the distillation term, from 0 to 1; the cross entropy has weight 1 - alpha. The default 0.9 is
            that of RepDistiller and most other implementations.
        l1_weight: weight of the activation penalty: one number for all activations, or a sequence with one number for
            each. The default 0 disables the penalty.
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`. Default 0.
        ignore_index: rows with this label contribute nothing to KD and CE, and their gradient is 0. Default -100, as in
            `torch.nn.functional.cross_entropy`.
        divergence: D, with p the teacher's distribution and q the student's. "forward_kl" (default) is KL(p ‖ q).
            "reverse_kl" is KL(q ‖ p), which favours a student that is confident where the teacher is. "jsd" is the
            generalised Jensen-Shannon divergence jsd_beta · KL(p ‖ m) + (1 - jsd_beta) · KL(q ‖ m) with
            m = jsd_beta · p + (1 - jsd_beta) · q. "dkd" is decoupled distillation: the divergence between
            (p_y, 1 - p_y) and (q_y, 1 - q_y) at the label y, and the divergence over the other classes, with a weight
            each; it needs labels. "skew_kl" is KL(p ‖ skew · p + (1 - skew) · q), "skew_reverse_kl" is
            KL(q ‖ (1 - skew) · p + skew · q); both are finite whatever the logits. "symmetric_kl" is the mean
            (KL(p ‖ q) + KL(q ‖ p)) / 2, half of Jeffreys' divergence: its size is that of one KL, so that temperature
            and alpha need not change with it.
        jsd_beta: β of "jsd", between 0 and 1. The default 0.5 gives the symmetric divergence.
        skew: the share of "skew_kl" and "skew_reverse_kl", between 0 and 1: that of the distribution which the KL
            weights its classes by. The default 0.1 is DistiLLM's (Ko et al. 2024, arXiv:2402.03898).
        dkd_target_weight: weight of the label's part of "dkd", at least 0. The default 1 is the paper's.
        dkd_non_target_weight: weight of the other classes' part of "dkd", at least 0. The default 8 is the paper's
            choice for CIFAR-100.
        standardize_logits: whether D uses (x - mean) / (std + 1e-7) of each row instead of the logits, for both
            networks, so that the student need not match the scale of the teacher's logits. The cross entropy always
            uses the logits. Default False.
        class_dim: the dimension of the classes in both logits. Default -1. Use 1 for segmentation, (N, C, H, W).
        reduction: "mean" (default) divides KD and CE by the number of rows whose label is not `ignore_index`, and the
            penalty by the number of samples. "sum" does not divide. "none" returns KD and CE by row, without a penalty.
        normalizer: what "mean" divides by instead, a positive number. For gradient accumulation, the number of rows of
            all micro-batches. For several processes whose gradients are averaged, the number of rows of all of them,
            divided by the number of processes. The penalty is divided by it, too, times the samples of a row. Default
            None.
        class_weights: (C,), the weight of each class in CE, as `weight` of `torch.nn.functional.cross_entropy`: "mean"
            divides CE by the sum of the labels' weights, and by the number of rows if labels are probabilities. Default
            None.

    Raises:
        TypeError, ValueError: a setting is not as described. The message names it, what was expected and what came.
    """

    temperature: float | Tensor = 4.0
    alpha: float | Tensor = 0.9
    l1_weight: float | Tensor | Sequence[float | Tensor] = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    divergence: Divergence = "forward_kl"
    jsd_beta: float = 0.5
    skew: float = 0.1
    dkd_target_weight: float = 1.0
    dkd_non_target_weight: float = 8.0
    standardize_logits: bool = False
    class_dim: int = -1
    reduction: Reduction = "mean"
    normalizer: float | Tensor | None = None
    class_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if not _is_scalar_tensor("temperature", self.temperature):
            check_positive("temperature", self.temperature)
        if not _is_scalar_tensor("alpha", self.alpha):
            check_fraction("alpha", self.alpha)
        _check_weights(self.l1_weight)
        check_fraction("label_smoothing", self.label_smoothing)
        _check_ignore_index(self.ignore_index)
        if not isinstance(self.divergence, str) or self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        check_number("jsd_beta", self.jsd_beta)
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                "jsd_beta: expected a number between 0 and 1 (use 'forward_kl' instead of 0, 'reverse_kl' instead of "
                f"1), got {self.jsd_beta}"
            )
        check_number("skew", self.skew)
        if not 0 < self.skew < 1:
            raise ValueError(
                "skew: expected a number between 0 and 1 (use 'forward_kl' or 'reverse_kl' instead of 0; the "
                f"divergence is 0 with 1), got {self.skew}"
            )
        check_weight("dkd_target_weight", self.dkd_target_weight)
        check_weight("dkd_non_target_weight", self.dkd_non_target_weight)
        if not isinstance(self.standardize_logits, bool):
            raise TypeError(f"standardize_logits: expected a bool, got {type(self.standardize_logits).__name__}")
        if not isinstance(self.class_dim, int):
            raise TypeError(f"class_dim: expected an integer, got {type(self.class_dim).__name__}")
        self._check_reduction()
        if self.class_weights is not None and not _is_tensor(self.class_weights):
            raise TypeError(f"class_weights: expected a tensor or None, got {type(self.class_weights).__name__}")

    def _check_reduction(self) -> None:
        if not isinstance(self.reduction, str) or self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")
        if self.normalizer is None or _is_scalar_tensor("normalizer", self.normalizer):
            return
        check_positive("normalizer", self.normalizer)
        if self.reduction != "mean":
            raise ValueError(f"normalizer: expected None with reduction {self.reduction!r}, got {self.normalizer}")

    def read(self) -> LossSettings:
        """These settings with the values of tensors as numbers, which are checked.

        Raises:
            ValueError: a value is not as described.
        """
        weight = self.l1_weight
        weight = [_number(each) for each in weight] if _is_sequence(weight) else _number(weight)
        numbers = {name: _number(getattr(self, name)) for name in ("temperature", "alpha", "normalizer")}
        return replace(self, **numbers, l1_weight=weight)

    def scalars(self, layers: int) -> list[Any]:
        """temperature, alpha, normalizer (0 stands for the number of rows), and one `l1_weight` for each activation.

        Raises:
            ValueError: l1_weight is a sequence of another length.
        """
        weight = self.l1_weight
        weights = list(weight) if _is_sequence(weight) else [weight] * layers
        if len(weights) != layers:
            raise ValueError(f"l1_weight: expected one weight for each of {layers} activations, got {len(weights)}")
        normalizer = (0.0 if self.reduction == "mean" else 1.0) if self.normalizer is None else self.normalizer
        values: tuple[Any, ...] = (self.temperature, self.alpha, normalizer, *weights)
        return [value if type(value) is float or _is_tensor(value) else float(value) for value in values]

    def _mixture(self) -> tuple[float, float, float]:
        """The share of p in the mixture m, and the weights of KL(p ‖ m) and KL(q ‖ m)."""
        if self.divergence == "skew_kl":
            return self.skew, 1.0, 0.0
        if self.divergence == "skew_reverse_kl":
            return 1 - self.skew, 0.0, 1.0
        return self.jsd_beta, self.jsd_beta, 1 - self.jsd_beta

    def kernel_class_weights(self, labels: Tensor | None) -> Tensor | None:
        """`class_weights`, unless a row's weight of CE contains its class's, which is enough without smoothing."""
        if labels is None or not (labels.is_floating_point() or self.label_smoothing != 0):
            return None
        return self.class_weights

    def constants(self) -> tuple[Any, ...]:
        """All other settings, in the order of the operator `kddp::kd_l1_loss`."""
        return (
            float(self.label_smoothing),
            self.ignore_index,
            _KERNEL_DIVERGENCES.get(self.divergence, _MIXTURE),
            *self._mixture(),
            float(self.dkd_target_weight),
            float(self.dkd_non_target_weight),
            self.standardize_logits,
            self.reduction == "none",
        )


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a real number that a float can hold."""
    if isinstance(value, float):
        return
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number that a float can hold, got a larger one") from error


def check_positive(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_fraction(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")


def check_weight(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def _check_weights(l1_weight: Any) -> None:
    for weight in l1_weight if _is_sequence(l1_weight) else (l1_weight,):
        if not _is_scalar_tensor("l1_weight", weight):
            check_weight("l1_weight", weight)


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return not isinstance(value, float | str | bytes) and isinstance(value, Sequence)


def _is_tensor(value: Any) -> bool:
    if isinstance(value, float):
        return False
    torch = sys.modules.get("torch")  # `kddp --help` imports this module and must not import torch
    return torch is not None and isinstance(value, torch.Tensor)


def _is_scalar_tensor(name: str, value: Any) -> bool:
    """Whether `value` is a tensor; raises unless it holds one real number."""
    if not _is_tensor(value):
        return False
    if value.dim() != 0 or value.is_complex():
        raise ValueError(f"{name}: expected a number or a 0-dim tensor, got a tensor of shape {tuple(value.shape)}")
    return True


def _number(value: Any) -> Any:
    return value.item() if _is_tensor(value) else value


def _check_ignore_index(ignore_index: Any) -> None:
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        bits = ignore_index.bit_length()
        raise ValueError(f"ignore_index: expected a 64-bit integer, as labels are, got one of {bits} bits")
