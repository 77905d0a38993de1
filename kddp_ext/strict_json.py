"""JSON from outside: read as its standard says, or refused with a ValueError, whatever it holds."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(text: str, *, most: int, finite: bool = True) -> Any:
    """The value that a JSON text holds.

    Python's reader takes more than JSON is: NaN and Infinity, a key that comes twice (the first is lost), and
    halves of surrogate pairs, which no console can print. And it does not always fail with a ValueError.

    Args:
        text: of one value.
        most: characters that it may have. What Python makes of JSON takes up to 40 times as much memory.
        finite: whether NaN, Infinity and numbers beyond a float are refused (default), or read.

    Raises:
        ValueError: it is no JSON, or holds one of these, or a whole number of thousands of digits, or is nested
            deeper than the interpreter's stack.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected JSON text, got {type(text).__name__}")
    if len(text) > most:
        raise ValueError(f"expected at most {most} characters, got {len(text)}")
    hooks: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, **hooks)
        if not text.isascii() or "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair") from error
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds a number that is not finite: {text[:40]}")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds a key twice: {next(name for name in values if names.count(name) > 1)[:40]!r}")
    return values
