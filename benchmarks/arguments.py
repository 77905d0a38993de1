"""Argument types for argparse: each returns the value or raises an error that says what was expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


def names_of(available: Collection[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of names from `available`."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in available]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(available)}, got {', '.join(unknown)}")
        return chosen

    return names


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number
