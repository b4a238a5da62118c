"""Tokens that must come: what a grammar leaves one way for, which the host knows before the model.

They are drafts like any others (`streamserve.core.speculation`), the best that there are: the masks
of the samples let nothing else through, but for what may end an answer there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from streamserve.config import MAX_FORCED_TOKENS

FIRST_FORCED_RATE = 0.95  # of forced tokens that are right, before any was tried
FIRST_FORCED_SHARE = 0.3  # of positions in a grammar behind which something is forced

_FIRST_LENGTH = 3.0
_RATE_OF_LEARNING = 0.1
_RATE_OF_LOOKING = 0.05
_HOPE = 0.002  # at each look

FindForced = Callable[[int], list[int]]
"""The tokens that must follow a request's known ones, at most so many."""


class Answer(Protocol):
    """What is read of a request."""

    token_ids: list[int]


class ForcedTokens:
    """One request's, how often they were right lately, and how often there were some."""

    __slots__ = ("_find", "_length", "_num_tokens", "_share", "_token_ids", "are_drafted", "rate")

    def __init__(self, find: FindForced, rate: float, share: float) -> None:
        """``rate`` and ``share`` are supposed at first."""
        self._find = find
        self._num_tokens = -1  # of the request, when they were found
        self._token_ids: list[int] = []
        self._share = share  # of positions behind which there were some
        self._length = _FIRST_LENGTH
        self.rate = rate
        self.are_drafted = False  # if there are drafts in flight: they are of these

    def behind(self, request: Answer) -> list[int]:
        """Those that follow what is known of it."""
        num_tokens = len(request.token_ids)
        if num_tokens != self._num_tokens:
            self._num_tokens = num_tokens
            self._token_ids = token_ids = self._find(MAX_FORCED_TOKENS)
            self.rate += _HOPE * (1.0 - self.rate)
            self._share += _RATE_OF_LOOKING * (bool(token_ids) - self._share)
            if token_ids:
                self._length += _RATE_OF_LOOKING * (len(token_ids) - self._length)
        return self._token_ids

    def prospects(self, request: Answer) -> tuple[float, float, int]:
        """Of what may be forced behind the token that a step in flight samples.

        How likely the first is there and right, each further one behind it, and how many at most.
        """
        num_known = len(self.behind(request)) - 1  # the first is that token itself
        if num_known > 0:
            return self.rate, self.rate, num_known
        then = self.rate * (1.0 - 1.0 / max(self._length, 1.0))
        return self.rate * self._share, then, MAX_FORCED_TOKENS


def learned(rate: float, num_tried: int, num_right: int) -> float:
    """A rate of drafts that are right, after as many more: behind a wrong one none was tried."""
    for i in range(min(num_right + 1, num_tried)):
        rate += _RATE_OF_LEARNING * ((i < num_right) - rate)
    return rate
