"""What the values of flags may be: types for argparse whose messages say what is wanted."""

from __future__ import annotations

import json
import math
import re
from argparse import ArgumentTypeError
from fractions import Fraction
from typing import Any

from streamserve.errors import ConfigError
from streamserve.runner.memory import parse_bytes

_MULTIPLIERS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def integer(text: str) -> int:
    """Any whole number."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """At least 1."""
    return _at_least(1, integer(text))


def tokens(text: str) -> int:
    """At least 1. As in vLLM ``32k`` is 32,000 and ``32K`` 32,768; ``25.6k`` is 25,600."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG])", text)
    if match is None:
        return positive(text)
    value = Fraction(match[1]) * _MULTIPLIERS[match[2]]
    if value.denominator != 1:
        raise ArgumentTypeError(f"must be a whole number, got {text!r}")
    return _at_least(1, int(value))


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


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"must be JSON, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _at_least(limit: int, value: int) -> int:
    if value < limit:
        raise ArgumentTypeError(f"must be at least {limit}, got {value}")
    return value
