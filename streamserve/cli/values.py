"""What the values of flags may be: types for argparse whose messages say what is wanted."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

from streamserve.errors import ConfigError
from streamserve.runner.memory import parse_bytes


def integer(text: str) -> int:
    """Any whole number."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """At least 1."""
    return _at_least(1, integer(text))


def count(text: str) -> int:
    """At least 0."""
    return _at_least(0, integer(text))


def number(text: str) -> float:
    """Any number, infinity included."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def milliseconds(text: str) -> float:
    """A time that passes, and ends."""
    value = number(text)
    if not 0.0 < value < float("inf"):
        raise ArgumentTypeError(f"must be above 0, got {text}")
    return value


def size(text: str) -> str:
    """What ``parse_bytes`` reads."""
    try:
        parse_bytes(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error).removeprefix("a size ")) from None
    return text


def gibibytes(text: str) -> str | None:
    """A size; as in vLLM a number alone is of GiB, and 0 is none."""
    try:
        value = float(text)
    except ValueError:
        return size(text)
    return size(f"{text}GiB") if value else None


def _at_least(limit: int, value: int) -> int:
    if value < limit:
        raise ArgumentTypeError(f"must be at least {limit}, got {value}")
    return value
