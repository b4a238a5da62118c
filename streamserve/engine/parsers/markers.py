"""Looking for markers in a text whose end is not there yet."""

from __future__ import annotations

import re

NAME = re.compile(r"[a-zA-Z0-9_.-]{0,64}")
"""As much of a function's name as there is."""


def num_undecided(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that ``marker`` begins with and goes on after."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def may_become(text: str, marker: str) -> bool:
    """Whether ``text`` is a beginning of ``marker``, and not all of it."""
    return len(text) < len(marker) and marker.startswith(text)


def num_leading_spaces(text: str) -> int:
    """White space in front."""
    return len(text) - len(text.lstrip())
