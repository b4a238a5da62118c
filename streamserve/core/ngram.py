"""Prompt lookup: what followed the last time that the text ended as it does now.

Saxena, "Prompt Lookup Decoding" (2023); vLLM calls it the n-gram method. Beside the drafts, the
index tells how good they would have been: every token that a request gets, drafted or not, is
compared with what would have been drafted for it, so whether drafting pays is known before it is
tried.
"""

from __future__ import annotations

_BITS = 32  # of a token id in a key
_MAX_CANDIDATES = 8  # earlier places whose context is compared
_RATE = 0.06  # of the running means: they forget within some sixteen tokens
_FIRST_CONTINUES = 0.7  # before a hit was followed by anything


class NgramIndex:
    """Where each n-gram of ``min_n`` tokens was followed by what: O(1) per token, for one request.

    Only the shortest n-grams are indexed. Those that end alike are chained, latest first, and the
    one that agrees furthest back, up to ``max_n`` tokens, is taken::

        token_ids   … a b c d … x b c e … a b c
                            └───────┘             followers of (b, c), latest first: e, d
                                                  (a, b, c) agrees further back: d is drafted

    ``hit_rate`` is the share of tokens that a draft would have got right, those for which there was
    none among them; ``hit_rate_when_found`` without these; ``continue_rate`` the share of hits
    among the tokens behind a hit. All are recent.
    """

    __slots__ = (
        "_followers",
        "_is_behind_hit",
        "_key",
        "_mask",
        "_max_n",
        "_min_n",
        "_previous",
        "continue_rate",
        "hit_rate",
        "hit_rate_when_found",
    )

    def __init__(self, min_n: int, max_n: int) -> None:
        self._min_n = min_n
        self._max_n = max_n
        self._mask = (1 << (_BITS * min_n)) - 1
        self._key = 0  # the last ``min_n`` tokens, exactly
        self._followers: dict[int, int] = {}  # key -> the latest position behind it
        self._previous: list[int] = []  # by position: the one before with the same key, or -1
        self._is_behind_hit = False
        self.hit_rate = 0.0
        self.hit_rate_when_found = 0.5
        self.continue_rate = _FIRST_CONTINUES

    @property
    def num_indexed(self) -> int:
        """Leading tokens that were taken in."""
        return len(self._previous)

    def extend(self, token_ids: list[int], end: int) -> None:
        """Take in the tokens up to ``end`` that have not been."""
        key, mask, min_n = self._key, self._mask, self._min_n
        followers, previous = self._followers, self._previous
        for position in range(len(previous), end):
            token_id = token_ids[position]
            found = followers.get(key, -1) if position >= min_n else -1
            previous.append(found)
            if position >= min_n:
                followers[key] = position
                self._observe(found >= 0, found >= 0 and token_ids[found] == token_id)
            key = ((key << _BITS) | token_id) & mask
        self._key = key

    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """What may follow all of ``token_ids``, which were taken in; empty if nothing is known.

        A draft that reaches the end of the text goes on in itself, as text that repeats does.
        """
        num_known = len(token_ids)
        if num_known < self._min_n:
            return []
        source = self._best(token_ids, self._followers.get(self._key, -1))
        if source < 0:
            return []
        drafts: list[int] = token_ids[source : source + num_tokens]
        while len(drafts) < num_tokens:
            drafts.append(drafts[source + len(drafts) - num_known])
        return drafts

    def _best(self, token_ids: list[int], candidate: int) -> int:
        """Of a chain of followers, the latest of those whose context agrees furthest back."""
        best, longest = candidate, self._min_n
        end = len(token_ids)
        for _ in range(_MAX_CANDIDATES):
            if candidate < 0 or longest >= self._max_n:
                break
            length = self._min_n
            limit = min(self._max_n, candidate)
            before, last = candidate - 1, end - 1
            while length < limit and token_ids[before - length] == token_ids[last - length]:
                length += 1
            if length > longest:
                best, longest = candidate, length
            candidate = self._previous[candidate]
        return best

    def _observe(self, is_found: bool, is_hit: bool) -> None:
        self.hit_rate += _RATE * (is_hit - self.hit_rate)
        if is_found:
            self.hit_rate_when_found += _RATE * (is_hit - self.hit_rate_when_found)
            if self._is_behind_hit:
                self.continue_rate += _RATE * (is_hit - self.continue_rate)
        self._is_behind_hit = is_hit
