"""`fused_kd_l1_loss`: distillation, classification and activation penalty in one native pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kddp_ext import ops
from kddp_ext.activations.layout import NeuronMatrix, as_matrix
from kddp_ext.activations.statistics import TrackedActivations
from kddp_ext.loss.settings import LossOptions, LossSettings
from kddp_ext.ops import reference

Backend = Literal["auto", "native", "reference"]
_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_devices_warned_of: set[str] = set()


class LossTerms(NamedTuple):
    """The terms of the loss before weighting: 0-dim tensors without gradient, on the loss's device.

    Attributes:
        kd: T² times the divergence, averaged over the rows whose label is not `ignore_index`; 0 without a teacher.
        ce: cross entropy with the labels, averaged over the same rows; 0 without labels.
        l1: Σ|a| over the neurons of all layers, averaged over the batch and over positions.
        correct: number of rows whose highest logit is the label's; 0 without labels.
    """

    kd: Tensor
    ce: Tensor
    l1: Tensor
    correct: Tensor


@overload
def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor] = ...,
    *,
    return_terms: Literal[False] = ...,
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> Tensor: ...
@overload
def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor] = ...,
    *,
    return_terms: Literal[True],
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> tuple[Tensor, LossTerms]: ...
@overload
def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor] = ...,
    *,
    return_terms: bool = ...,
    backend: Backend = ...,
    **settings: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossTerms]: ...


def fused_kd_l1_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor] = (),
    *,
    return_terms: bool = False,
    backend: Backend = "auto",
    **settings: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossTerms]:
    """Distillation, classification and activation penalty: one value, with one pass over each input.

        loss = alpha · T² · D(softmax(t/T), softmax(s/T)) + (1 - alpha) · CE(s, labels) + Σ l1_weight · Σ|a| / N

    D is KL(softmax(t/T) ‖ softmax(s/T)) by default. The same pass computes the gradient, which `backward` only scales.
    The teacher's logits are constants. Sums are accumulated in float32 and float64.
    Second derivatives, forward mode and torch.func's transforms are computed by the reference in plain PyTorch.

    Args:
        student_logits: (N, C) float32, float64, bfloat16 or float16, with any strides.
        teacher_logits: (N, C) of any of these dtypes. May be None if alpha is 0.
        labels: (N,) integers from 0 to C - 1, or `ignore_index`. May be None if alpha is 1.
        activations: the tensors to penalise, of any of these dtypes: (N, H) outputs of fully-connected layers, or
            (N, C, *positions) of convolutions, where each channel counts with the mean of |a| over positions. With the
            activations of a `DynamicPruner`, the same pass also updates the pruner's statistics.
        return_terms: also return the unweighted terms, for logging without a second computation.
        backend: "native" for the kernels (raises if this build has none for the device), "reference" for plain
            PyTorch, "auto" (default) for the kernels if there are any.
        **settings: the fields of `LossSettings`, which documents them: temperature=4.0, alpha=0.9, l1_weight=0.0,
            label_smoothing=0.0, ignore_index=-100, divergence="forward_kl", jsd_beta=0.5, dkd_target_weight=1.0,
            dkd_non_target_weight=8.0, standardize_logits=False.

    Returns:
        The loss, 0-dim float32 (float64 if an input is), with its gradients in the dtypes of the inputs; or (loss,
        LossTerms) with `return_terms`. Both are 0 if N is 0 or if every row is ignored.

    Raises:
        TypeError, ValueError: an argument is not as described. The message names it, what was expected and what came.
            On GPUs an out-of-range label does not raise, because checking it would need a sync; the loss is then NaN.

    The distillation term is by Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), with their factor T²; the penalty by
    Şener and Akbaş 2022 (doi 10.29109/gujsc.1141648). The other divergences are by Gu et al. 2024 (arXiv:2306.08543),
    Agarwal et al. 2024 (arXiv:2306.13649) and Zhao et al. 2022 (arXiv:2203.08679), standardised logits by Sun et al.
    2024 (arXiv:2403.01427). docs/losses.md compares them, and the conventions of other libraries.
    """
    return compute_loss(
        student_logits, teacher_logits, labels, activations, LossSettings(**settings), return_terms, backend
    )


def compute_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    settings: LossSettings,
    return_terms: bool,
    backend: Backend,
) -> Tensor | tuple[Tensor, LossTerms]:
    """`fused_kd_l1_loss` with settings that are checked already."""
    check_output(return_terms, backend)
    _check_tensors(student_logits, teacher_logits, labels, activations, settings)
    native = _choose_native(student_logits.device, backend)
    if native and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "fused_kd_l1_loss: torch.jit.trace cannot record the native kernels; use backend='reference' "
            "or torch.export"
        )
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if settings.has_tensors() and not tracing:
        read = settings.read()  # also checks the values
        if native:
            _require_constants(settings)
            settings = read
    if teacher_logits is not None and teacher_logits.requires_grad:
        teacher_logits = teacher_logits.detach()
    if labels is not None and labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    tracked = activations if isinstance(activations, TrackedActivations) and torch.is_grad_enabled() else None
    if tracked is not None and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "activations: a pruner's statistics cannot be updated inside torch.func's transforms; pass "
            "list(pruner.activations), and call pruner.activations.observe() outside"
        )
    matrices = _matrices(activations)
    tensors = (student_logits, teacher_logits, labels, [matrix.values for matrix in matrices])
    scalars = settings.scalars(len(matrices))
    if tracked is not None and student_logits.requires_grad:
        _require_gradients(tracked, scalars[2:])
    others = (scalars, [matrix.samples for matrix in matrices])
    if native and ops.native_derivatives():
        loss, terms, sums = ops.kd_l1_loss(*tensors, *others, settings.constants(), statistics=tracked is not None)
        if tracked is not None:
            tracked.update(matrices, sums)
    else:
        if type(labels) is Tensor and labels.is_cpu and not tracing:
            _check_label_values(labels, student_logits.shape[1], settings.ignore_index)
        loss, terms = reference.kd_l1_loss(*tensors, *others, *settings.constants())
        if tracked is not None:
            tracked.observe()
    return (loss, LossTerms(*terms.unbind())) if return_terms else loss


def _matrices(activations: Sequence[Tensor]) -> list[NeuronMatrix]:
    if isinstance(activations, TrackedActivations):
        return activations.matrices()
    return [as_matrix(activation) for activation in activations]


def _choose_native(device: torch.device, backend: Backend) -> bool:
    if backend == "reference":
        return False
    if ops.is_native(device):
        return True
    if backend == "native":
        raise ValueError(
            "backend: expected 'auto' or 'reference', since this build of kddp_ext has no native kernels for "
            f"{device.type!r} tensors, got 'native'{ops.how_to_build(device)}"
        )
    if device.type not in _devices_warned_of:
        _devices_warned_of.add(device.type)
        warnings.warn(
            f"kddp_ext has no native kernels for {device.type!r} in this build: the loss runs in plain PyTorch"
            f"{ops.how_to_build(device)}",
            stacklevel=4,
        )
    return False


def check_output(return_terms: bool, backend: str) -> None:
    """Raise unless `return_terms` and `backend` are as `fused_kd_l1_loss` describes them."""
    if not isinstance(return_terms, bool):
        raise TypeError(f"return_terms: expected a bool, got {type(return_terms).__name__}")
    if not isinstance(backend, str) or backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend: expected 'auto', 'native' or 'reference', got {backend!r}")


def _check_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    activations: Sequence[Tensor],
    settings: LossSettings,
) -> None:
    _check_logits("student_logits", student_logits, student_logits)
    if student_logits.shape[1] < 1:
        raise ValueError(f"student_logits: expected at least one class, got shape {tuple(student_logits.shape)}")
    if teacher_logits is not None:
        _check_logits("teacher_logits", teacher_logits, student_logits)
        if teacher_logits.shape != student_logits.shape:
            expected, got = tuple(student_logits.shape), tuple(teacher_logits.shape)
            raise ValueError(f"teacher_logits: expected the student's shape {expected}, got {got}")
    elif isinstance(settings.alpha, Tensor) or settings.alpha != 0:
        raise ValueError(f"teacher_logits: expected a tensor, since alpha is {settings.alpha} and not 0, got None")
    if labels is not None:
        _check_labels(labels, student_logits)
    elif isinstance(settings.alpha, Tensor) or settings.alpha != 1:
        raise ValueError(f"labels: expected a tensor, since alpha is {settings.alpha} and not 1, got None")
    elif settings.divergence == "dkd":
        raise ValueError("labels: expected a tensor, since divergence is 'dkd', got None")
    _check_activations(activations, student_logits)


def _require_constants(settings: LossSettings) -> None:
    for name in ("temperature", "alpha", "l1_weight"):
        value = getattr(settings, name)
        for each in value if isinstance(value, Sequence) else (value,):
            if isinstance(each, Tensor) and each.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}: expected a constant, because the kernels have no derivative with respect to settings, "
                    "got a tensor that requires a gradient; detach it, or use backend='reference'"
                )


def _check_logits(name: str, logits: Tensor, student_logits: Tensor) -> None:
    _check_values(name, logits, student_logits)
    if logits.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(logits.shape)}")


def _check_labels(labels: Tensor, student_logits: Tensor) -> None:
    _check_dense("labels", labels)
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels: expected an integer dtype such as int64, got {labels.dtype}")
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(f"labels: expected shape {(student_logits.shape[0],)}, got {tuple(labels.shape)}")
    _check_device("labels", labels, student_logits)


def _check_activations(activations: Sequence[Tensor], student_logits: Tensor) -> None:
    if isinstance(activations, Tensor) or not isinstance(activations, Sequence):
        raise TypeError(f"activations: expected a sequence of tensors, got {type(activations).__name__}")
    rows = student_logits.shape[0]
    axes = activations.axes if isinstance(activations, TrackedActivations) else None
    for index, activation in enumerate(activations):
        name = f"activations[{index}]"
        _check_values(name, activation, student_logits)
        shape = activation.shape
        if len(shape) < 2:
            expected = "(rows, neurons) or (rows, channels, *positions)"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(shape)}")
        if (axes is None or axes[index] == 1) and shape[0] != rows:
            raise ValueError(f"{name}: expected {rows} rows as in student_logits, got shape {tuple(shape)}")


def _require_gradients(activations: TrackedActivations, l1_weights: Sequence[Any]) -> None:
    """Raise if the penalty on a pruner's activations would silently have no gradient."""
    for index, (activation, weight) in enumerate(zip(activations, l1_weights, strict=True)):
        if not activation.requires_grad and (isinstance(weight, Tensor) or weight != 0):
            raise ValueError(
                f"activations[{index}]: expected a tensor that requires a gradient, as student_logits does, got one "
                "without, so its penalty would change nothing; use checkpoints with use_reentrant=False, call the "
                "model outside torch.no_grad(), and give frozen layers an l1_weight of 0"
            )


def _check_values(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    _check_dense(name, tensor)
    if tensor.dtype not in ops.ELEMENT_TYPES:
        raise TypeError(f"{name}: expected dtype float32, float64, bfloat16 or float16, got {tensor.dtype}")
    _check_device(name, tensor, student_logits)


def _check_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: expected a dense tensor, got layout {layout}")


def _check_device(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    if tensor.device != student_logits.device:
        raise ValueError(f"{name}: expected device {student_logits.device} as student_logits, got {tensor.device}")


def _check_label_values(labels: Tensor, classes: int, ignore_index: int) -> None:
    """The check that the CPU kernels do in their pass; PyTorch's own functions do less of it, or none."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    rows = wrong.nonzero().flatten()
    if len(rows):
        row = int(rows[0])
        raise ValueError(
            f"labels: expected values from 0 to {classes - 1} or ignore_index={ignore_index}, got {int(labels[row])} "
            f"in row {row}"
        )
