"""The fused loss as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Literal, cast, overload

from torch import Tensor, nn
from typing_extensions import TypeVar

from kddp_ext.loss import arguments
from kddp_ext.loss.functional import Backend, Divergence, LossTerms, fused_kd_l1_loss

Result = TypeVar("Result", default=Tensor)  # what a call returns, which `return_terms` decides


class FusedKDL1Loss(nn.Module, Generic[Result]):
    """`fused_kd_l1_loss` as a module; it takes the same settings and has no parameters.

    The settings are attributes too, and mean what they mean to the function: `temperature`, `alpha`, `l1_weight`,
    `label_smoothing`, `ignore_index`, `divergence`, `jsd_beta`, `dkd_target_weight`, `dkd_non_target_weight`,
    `standardize_logits`, `return_terms`, `backend`.

    Raises:
        TypeError, ValueError: a setting is not as described there, apart from what depends on the tensors.
    """

    # fmt: off
    @overload
    def __init__(
        self: FusedKDL1Loss[Tensor],
        temperature: float = ..., alpha: float = ..., l1_weight: float | Sequence[float] = ...,
        label_smoothing: float = ..., ignore_index: int = ..., divergence: Divergence = ..., jsd_beta: float = ...,
        dkd_target_weight: float = ..., dkd_non_target_weight: float = ..., standardize_logits: bool = ...,
        return_terms: Literal[False] = ..., backend: Backend = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: FusedKDL1Loss[tuple[Tensor, LossTerms]],
        temperature: float = ..., alpha: float = ..., l1_weight: float | Sequence[float] = ...,
        label_smoothing: float = ..., ignore_index: int = ..., divergence: Divergence = ..., jsd_beta: float = ...,
        dkd_target_weight: float = ..., dkd_non_target_weight: float = ..., standardize_logits: bool = ...,
        *, return_terms: Literal[True], backend: Backend = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: FusedKDL1Loss[Tensor | tuple[Tensor, LossTerms]],
        temperature: float = ..., alpha: float = ..., l1_weight: float | Sequence[float] = ...,
        label_smoothing: float = ..., ignore_index: int = ..., divergence: Divergence = ..., jsd_beta: float = ...,
        dkd_target_weight: float = ..., dkd_non_target_weight: float = ..., standardize_logits: bool = ...,
        return_terms: bool = ..., backend: Backend = ...,
    ) -> None: ...
    # fmt: on

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.9,
        l1_weight: float | Sequence[float] = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        divergence: Divergence = "forward_kl",
        jsd_beta: float = 0.5,
        dkd_target_weight: float = 1.0,
        dkd_non_target_weight: float = 8.0,
        standardize_logits: bool = False,
        return_terms: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        arguments.check_settings(temperature, alpha, label_smoothing, ignore_index)
        arguments.check_divergence(divergence, jsd_beta, standardize_logits, dkd_target_weight, dkd_non_target_weight)
        arguments.check_weights(l1_weight, len(l1_weight) if isinstance(l1_weight, Sequence) else 0)
        arguments.check_output(return_terms, backend)
        self.divergence: Divergence = divergence
        self.jsd_beta = jsd_beta
        self.dkd_target_weight = dkd_target_weight
        self.dkd_non_target_weight = dkd_non_target_weight
        self.standardize_logits = standardize_logits
        self.temperature = temperature
        self.alpha = alpha
        self.l1_weight = l1_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.return_terms = return_terms
        self.backend: Backend = backend

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, l1_weight={self.l1_weight}, "
            f"divergence={self.divergence!r}, standardize_logits={self.standardize_logits}"
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        activations: Sequence[Tensor] = (),
    ) -> Result:
        """The loss, or (loss, LossTerms) with `return_terms`."""
        result = fused_kd_l1_loss(
            student_logits,
            teacher_logits,
            labels,
            activations,
            temperature=self.temperature,
            alpha=self.alpha,
            l1_weight=self.l1_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            divergence=self.divergence,
            jsd_beta=self.jsd_beta,
            dkd_target_weight=self.dkd_target_weight,
            dkd_non_target_weight=self.dkd_non_target_weight,
            standardize_logits=self.standardize_logits,
            return_terms=self.return_terms,
            backend=self.backend,
        )
        return cast("Result", result)

    if TYPE_CHECKING:  # that of nn.Module returns anything

        def __call__(
            self,
            student_logits: Tensor,
            teacher_logits: Tensor | None,
            labels: Tensor | None,
            activations: Sequence[Tensor] = (),
        ) -> Result: ...
