"""The fused loss as a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, cast, overload

from torch import Tensor, nn
from typing_extensions import Self, TypeVar, Unpack

from kddp_ext.loss.functional import Backend, LossTerms, check_output, compute_loss
from kddp_ext.loss.settings import LossOptions, LossSettings

Result = TypeVar("Result", default=Tensor)  # the type of a call's result, which `return_terms` decides
_SETTINGS = frozenset(field.name for field in dataclasses.fields(LossSettings))


class FusedKDL1Loss(nn.Module, Generic[Result]):
    """`fused_kd_l1_loss` as a module without parameters.

    Args:
        return_terms: as of `fused_kd_l1_loss`.
        backend: as of `fused_kd_l1_loss`.
        **settings: the fields of `LossSettings`.

    Attributes:
        settings: the settings as one `LossSettings`. Its fields are attributes of the module, too: read
            `criterion.alpha`, or set `criterion.alpha = 0.5` for a schedule, which checks the new value. Moving the
            module moves `class_weights`.

    Raises:
        TypeError, ValueError: a setting is not as described there.
    """

    @overload
    def __init__(
        self: FusedKDL1Loss[Tensor],
        *,
        return_terms: Literal[False] = ...,
        backend: Backend = ...,
        **settings: Unpack[LossOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: FusedKDL1Loss[tuple[Tensor, LossTerms]],
        *,
        return_terms: Literal[True],
        backend: Backend = ...,
        **settings: Unpack[LossOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: FusedKDL1Loss[Tensor | tuple[Tensor, LossTerms]],
        *,
        return_terms: bool = ...,
        backend: Backend = ...,
        **settings: Unpack[LossOptions],
    ) -> None: ...

    def __init__(
        self, *, return_terms: bool = False, backend: Backend = "auto", **settings: Unpack[LossOptions]
    ) -> None:
        super().__init__()
        check_output(return_terms, backend)
        self.settings = LossSettings(**settings)
        self.return_terms = return_terms
        self.backend: Backend = backend

    def __getattr__(self, name: str) -> Any:
        if name in _SETTINGS:
            return getattr(self.settings, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            name, value = "settings", dataclasses.replace(self.settings, **{name: value})
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move `class_weights` with the module, as `criterion.to(device)` moves the weights of a CrossEntropyLoss."""
        if self.settings.class_weights is not None:
            self.class_weights = fn(self.settings.class_weights)
        return cast("Self", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        settings = (
            f"{field.name}={getattr(self.settings, field.name)!r}" for field in dataclasses.fields(LossSettings)
        )
        return ", ".join([*settings, f"return_terms={self.return_terms}", f"backend={self.backend!r}"])

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        activations: Tensor | Sequence[Tensor] = (),
        sample_weights: Tensor | None = None,
    ) -> Result:
        """The loss, or (loss, LossTerms) with `return_terms`."""
        tensors = (student_logits, teacher_logits, labels, activations, sample_weights)
        result = compute_loss(*tensors, self.settings, self.return_terms, self.backend)
        return cast("Result", result)

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(
            self,
            student_logits: Tensor,
            teacher_logits: Tensor | None,
            labels: Tensor | None,
            activations: Tensor | Sequence[Tensor] = (),
            sample_weights: Tensor | None = None,
        ) -> Result: ...
