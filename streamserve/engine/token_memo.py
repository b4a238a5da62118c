r"""Token ids of the beginnings of long texts: a chat's next turn does not tokenise its history.

A text may be cut where an added token begins that ``tokenizers`` splits off before anything else::

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n        first turn
    |<----- ids are remembered ----->|
    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user…
                                     |<- the second turn tokenises from here on

What stands before and behind such a place is normalised and tokenised apart anyway. The second
part begins with the token itself, so that nothing takes it for the beginning of a text.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from threading import Lock

from tokenizers import AddedToken

MIN_CHARACTERS = 2048
"""Shorter texts are tokenised in a millisecond."""

_MAX_BYTES = 32 * 2**20
_MAX_ENTRIES = 256  # each is compared with every long text
_FIRST_WINDOW = 4096


class TokenMemo:
    """Remembers the ids of texts up to their last cut. May be used from several threads."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        cut_tokens: Sequence[str],
        *,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        """``encode`` adds no special tokens; ``cut_tokens`` is not empty (``safe_cut_tokens``)."""
        self._encode = encode
        self._cut = re.compile("|".join(map(re.escape, cut_tokens)))
        self._max_bytes = max_bytes
        self._num_bytes = 0
        # Whose text, and what it must begin with -> (where its cut is, ids up to there); oldest use
        # first.
        self._entries: OrderedDict[tuple[str, str], tuple[int, array[int]]] = OrderedDict()
        self._lock = Lock()

    def encode(self, text: str, salt: str = "") -> list[int]:
        """Equal to ``encode(text)`` of the tokenizer.

        What was remembered with another ``salt`` makes it no faster.
        """
        start, ids = self._find(text, salt)
        cut = self._last_cut(text)
        if cut is not None and cut.start() > start:
            ids = ids + array("I", self._encode(text[start : cut.start()]))
            start = cut.start()
            self._remember((salt, text[: cut.end()]), start, ids)
        return ids.tolist() + self._encode(text[start:])

    def _find(self, text: str, salt: str) -> tuple[int, array[int]]:
        """The longest beginning that is remembered."""
        with self._lock:
            known = max(
                (key for key in self._entries if key[0] == salt and text.startswith(key[1])),
                key=lambda key: len(key[1]),
                default=None,
            )
            if known is None:
                return 0, array("I")
            self._entries.move_to_end(known)
            return self._entries[known]

    def _remember(self, key: tuple[str, str], cut: int, ids: array[int]) -> None:
        with self._lock:
            if key in self._entries:  # another thread was faster
                return
            self._entries[key] = (cut, ids)
            self._num_bytes += _size_of(key[1], ids)
            while self._num_bytes > self._max_bytes or len(self._entries) > _MAX_ENTRIES:
                (_, oldest), (_, oldest_ids) = self._entries.popitem(last=False)
                self._num_bytes -= _size_of(oldest, oldest_ids)

    def _last_cut(self, text: str) -> re.Match[str] | None:
        """Look from the end on: a chat's last message is seldom long."""
        window = _FIRST_WINDOW
        while True:
            start = max(len(text) - window, 0)
            last = None
            for match in self._cut.finditer(text, start):
                last = match
            if last is not None or start == 0:
                return last
            window *= 4


def _size_of(text: str, ids: array[int]) -> int:
    return text.__sizeof__() + len(ids) * ids.itemsize


def safe_cut_tokens(added_tokens: Iterable[AddedToken]) -> list[str]:
    """The added tokens before which every text may be cut; empty if that cannot be known.

    One that is looked for in the text as it is, takes no space from its left, and wherever it is
    written cannot be a part of, or overlap with, another. Tokens that match whole words only look
    at their neighbours on both sides: with one of them nothing is safe.
    """
    raw = [token for token in added_tokens if not token.normalized and token.content]
    if any(token.single_word for token in raw):
        return []
    contents = [token.content for token in raw]
    return [
        token.content
        for token in raw
        if not token.lstrip
        and not token.content[0].isspace()  # another's ``rstrip`` may take it
        and not any(_may_cover(other, token.content) for other in contents)
    ]


def _may_cover(other: str, token: str) -> bool:
    """Whether where ``token`` begins ``other`` may be matched instead, or have been before."""
    if other != token and other.startswith(token):
        return True
    return any(other.startswith(token[: len(other) - i], i) for i in range(1, len(other)))
