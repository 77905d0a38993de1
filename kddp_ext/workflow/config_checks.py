"""Refuses what no run can use, by the name of its option."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from kddp_ext.workflow.errors import WorkflowError

LIMIT = 2**63  # what seeds and sizes are kept in


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


def check_types(config: Any, prefix: str = "") -> None:
    """Check every field of a dataclass, and of those inside it, against its annotation.

    The command line's values fit; a file's may be anything.

    Raises:
        WorkflowError: a value is none of the annotation's; the message names the option and what it may be.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise WorkflowError(
                f"--{option_name(prefix + field.name)}: expected {_expected(hint)}, got {reprlib.repr(value)}"
            )
        if dataclasses.is_dataclass(value):
            check_types(value, f"{field.name}.")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(hint)[0]) for each in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LIMIT
    if hint is float:
        return isinstance(value, float) or _fits(value, int)
    return isinstance(value, hint)


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return f"several, each {_expected(get_args(hint)[0])}"
    names = {int: "a whole number of at most 63 bits", float: "a number", bool: "True or False"}
    return names.get(hint, f"a {hint.__name__}")


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
