"""Words that must not be completed: which tokens are banned follows from the tokens before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamserve.core.plan import NewRequest

Int64Array: TypeAlias = NDArray[np.int64]
TokenIds: TypeAlias = tuple[int, ...]


def split_bad_words(
    words: Iterable[TokenIds], vocab_size: int
) -> tuple[Int64Array, list[TokenIds]]:
    """Tokens that are bad by themselves, and the words of several tokens."""
    known = [word for word in words if word and max(word) < vocab_size]
    alone = sorted({word[0] for word in known if len(word) == 1})
    return np.array(alone, dtype=np.int64), [word for word in known if len(word) > 1]


def outputs_before(request: NewRequest, words: Sequence[TokenIds]) -> list[int]:
    """As many generated tokens as the longest word looks back on; the prompt does not count."""
    outputs = request.token_ids[request.num_prompt_tokens :]
    return outputs[max(len(outputs) - _reach(words), 0) :]


def _reach(words: Sequence[TokenIds]) -> int:
    return max(len(word) for word in words) - 1


class BadWords:
    """Words of several tokens, and the end of what one request has generated."""

    __slots__ = ("_num_tokens", "_reach", "_recent", "_words")

    def __init__(self, words: Sequence[TokenIds], request: NewRequest) -> None:
        self._words = words
        self._reach = _reach(words)
        self._recent = outputs_before(request, words)
        self._num_tokens = len(request.token_ids)

    def extend(self, position: int, token_ids: Sequence[int]) -> None:
        """Take generated tokens at ``position, …``; those that were taken before are skipped."""
        new = token_ids[max(self._num_tokens - position, 0) :]
        if new:
            self._num_tokens += len(new)
            self._recent = [*self._recent, *new][-self._reach :]

    def banned(self) -> list[int]:
        """The tokens that would complete a word now."""
        recent = tuple(self._recent)
        return [word[-1] for word in self._words if recent[-(len(word) - 1) :] == word[:-1]]
