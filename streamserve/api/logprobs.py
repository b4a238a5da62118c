"""Logprobs in OpenAI's two formats: chat's list of objects and the older parallel arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamserve.core.plan import TokenLogprobs
from streamserve.engine.tokenizer import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's and vLLM's convention."""


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {**one(e.token_id, e.logprob), "top_logprobs": [one(i, p) for i, p in e.top]}
        for e in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The ``logprobs`` object of a completion choice, chunk by chunk.

    ``text_offset`` counts characters of the choice's text, so it runs on across chunks.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def render(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The object for the next tokens."""
        token_text = self._tokenizer.token_text
        tokens = [token_text(e.token_id) for e in entries]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(e.logprob) for e in entries],
            "tokens": tokens,
            "top_logprobs": [self._top(e) for e in entries],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        # As in OpenAI's API the sampled token is always there, even if it is not among the top.
        # Of several tokens with one text (parts of characters) the likeliest stays.
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        return top
