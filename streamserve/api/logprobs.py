"""Logprobs in OpenAI's two formats, chat's list of objects and the older parallel arrays, and in
vLLM's one for prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamserve.core.plan import TokenLogprobs
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.detokenizer import IncrementalDetokenizer
from streamserve.engine.tokenizer import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's and vLLM's convention."""

_KEEP_SPECIAL = SamplingParams(skip_special_tokens=False)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written: their text, or with ``as_ids`` as ``token_id:123``."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def __call__(self, token_id: int) -> str:
        """U+FFFD stands for part of a character."""
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


def chat_logprobs(entries: Sequence[TokenLogprobs], names: TokenNames) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names(token_id),
            "logprob": _finite(logprob),
            "bytes": list(names.tokenizer.token_bytes(token_id)),
        }

    content = [
        {**one(e.token_id, e.logprob), "top_logprobs": [one(i, p) for i, p in e.top]}
        for e in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """VLLM's ``prompt_logprobs``: for each token of the prompt an object by token id, or null.

    Nothing comes before the first token, so it has none.
    """

    def one(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }

    found: list[dict[str, Any] | None] = [None] * min(len(token_ids), 1)
    for entry in entries:
        tokens = {str(entry.token_id): one(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top, start=1):
            tokens.setdefault(str(token_id), one(token_id, logprob, rank))
        found.append(tokens)
    return found


class CompletionLogprobs:
    """The ``logprobs`` object of a completion choice, chunk by chunk.

    ``text_offset`` is where in the choice's text a token begins, so it runs on across chunks. The
    tokens of one character all begin where it does, and a token that leaves no text behind (a
    special one that is skipped) begins where the next one does.
    """

    def __init__(
        self, names: TokenNames, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._names = names
        self._num_top = params.logprobs
        self._prompt_token_ids = prompt_token_ids
        self._detokenizer = IncrementalDetokenizer(names.tokenizer, prompt_token_ids, params)
        self._offset = 0

    def echo(self, text: str, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The object for the prompt, which is shown as ``text``; first of all, if at all."""
        offsets = self._offsets_in(text)
        self._offset = len(text)
        first: dict[str, Any] = {
            "text_offset": offsets,
            "token_logprobs": [None, *(_finite(e.logprob) for e in entries)],
            "tokens": [self._names(token_id) for token_id in self._prompt_token_ids],
            "top_logprobs": [None, *(self._top(e) for e in entries)],
        }
        return first

    def render(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The object for the next tokens."""
        offsets: list[int] = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.add((entry.token_id,)))
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(e.logprob) for e in entries],
            "tokens": [self._names(e.token_id) for e in entries],
            "top_logprobs": [self._top(e) for e in entries],
        }

    def _offsets_in(self, text: str) -> list[int]:
        """Where the prompt's tokens begin in ``text``, which may lack its special tokens."""
        tokenizer = self._names.tokenizer
        detokenizer = IncrementalDetokenizer(tokenizer, (), _KEEP_SPECIAL)
        offset = 0
        offsets: list[int] = []
        for token_id in self._prompt_token_ids:
            offsets.append(offset)
            new = detokenizer.add((token_id,))
            if not tokenizer.is_special(token_id) or text.startswith(new, offset):
                offset = min(offset + len(new), len(text))
        return offsets

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        # As in OpenAI's API the sampled token is always there, even if it is not among the top.
        # Of several tokens with one text (parts of characters) the likeliest stays.
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._num_top], (entry.token_id, entry.logprob)):
            top.setdefault(self._names(token_id), _finite(logprob))
        return top


def joined(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """One object of two that follow each other, both of ``CompletionLogprobs``."""
    return {name: values + then[name] for name, values in first.items()}
