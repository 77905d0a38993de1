"""Refuses what no run can use, by the name of its option."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from kddp_ext.workflow.errors import WorkflowError


class Bound(NamedTuple):
    """What a number must be.

    Attributes:
        text: as the message says it.
        holds: whether a finite number is so.
    """

    text: str
    holds: Callable[[float], bool]


POSITIVE = Bound("a positive number", lambda value: value > 0)
NOT_NEGATIVE = Bound("a number of at least 0", lambda value: value >= 0)
BELOW_ONE = Bound("a number from 0 to below 1", lambda value: 0 <= value < 1)
SHARE = Bound("a number from 0 to 1", lambda value: 0 <= value <= 1)
INSIDE_SHARE = Bound("a number between 0 and 1", lambda value: 0 < value < 1)
POSITIVE_SHARE = Bound("a number above 0, at most 1", lambda value: 0 < value <= 1)


def check_choices(config: Any, prefix: str = "") -> None:
    """Check every field of a dataclass, and of those inside it, that is annotated as a Literal.

    Raises:
        WorkflowError: a value is none of the annotation's; the message names the option and the choices.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            check_choices(value, f"{field.name}.")
        elif get_origin(hint) is Literal and value not in get_args(hint):
            expected = ", ".join(map(str, get_args(hint)))
            raise WorkflowError(f"--{option_name(prefix + field.name)}: expected one of {expected}, got {value!r}")


def check_bounds(values: dict[str, Any], bounds: dict[str, Bound]) -> None:
    """Check the numbers of `values`, by option, against `bounds`.

    Raises:
        WorkflowError: a number is out of its bound, or not finite.
    """
    for option, bound in bounds.items():
        if not (math.isfinite(values[option]) and bound.holds(values[option])):
            raise WorkflowError(f"--{option_name(option)}: expected {bound.text}, got {values[option]}")


def option_name(field: str) -> str:
    """The command line's spelling of a field, such as "pruning.l1-weight"."""
    return field.replace("_", "-")
