r"""The bytes of OpenAI's answers. A streamed token costs one string dump between two constants.

::

    data: {"id":…,"choices":[{"index":0,"delta":{"content":   "Hi"   },"logprobs":null,…}]}\n\n
    |<------------------- head ------------------------->|<-text->|<-------- tail -------->|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from streamserve.api.logprobs import CompletionLogprobs, chat_logprobs
from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import Usage
from streamserve.engine.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_dumps = orjson.dumps


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs on the wire between the two endpoints."""

    id_prefix: str
    object: str
    chunk_object: str
    is_chat: bool


CHAT = Kind("chatcmpl-", "chat.completion", "chat.completion.chunk", True)
COMPLETION = Kind("cmpl-", "text_completion", "text_completion", False)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of one answer share."""

    kind: Kind
    id: str
    created: int
    model: str

    def head(self, object_name: str) -> bytes:
        """The object's opening, up to where ``choices`` begins. Not closed."""
        fields = {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
        }
        return _dumps(fields)[:-1] + b","


def usage_content(usages: Sequence[Usage]) -> dict[str, Any]:
    """The ``usage`` object over all choices of an answer."""
    prompt = sum(u.prompt_tokens for u in usages)
    completion = sum(u.completion_tokens for u in usages)
    content: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
    }
    thought = [u.reasoning_tokens for u in usages if u.reasoning_tokens is not None]
    if thought:
        content["completion_tokens_details"] = {"reasoning_tokens": sum(thought)}
    return content


def usage_frame(envelope: Envelope, usages: Sequence[Usage]) -> bytes:
    """The chunk after the last one that ``include_usage`` asks for: no choices, all usage."""
    head = b"data: " + envelope.head(envelope.kind.chunk_object)
    return head + b'"choices":[],"usage":' + _dumps(usage_content(usages)) + b"}\n\n"


def error_frame(status: int, content: dict[str, Any]) -> bytes:
    """The event that ends a stream which failed; ``status`` is what it would have had."""
    return b"data: " + _dumps({"error": {**content, "status": status}}) + b"\n\n"


class ChoiceFrames:
    """Renders the chunks of one choice. ``head`` and ``tail`` are for the fast path: a text frame
    is ``head + orjson.dumps(text) + tail`` unless logprobs or running usage were asked for.
    """

    def __init__(
        self,
        envelope: Envelope,
        index: int,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        logprobs_of: Tokenizer | None = None,
    ) -> None:
        is_chat = envelope.kind.is_chat
        self._is_chat = is_chat
        self._open = (
            b"data: "
            + envelope.head(envelope.kind.chunk_object)
            + b'"choices":[{"index":%d,' % index
            + (b'"delta":{' if is_chat else b'"text":')
        )
        self._content = b'"content":' if is_chat else b""
        self._close_delta = b"}" if is_chat else b""
        self._null_usage = b',"usage":null' if include_usage else b""
        self._continuous_usage = continuous_usage
        self._tokenizer = logprobs_of
        self._completion_logprobs = (
            CompletionLogprobs(logprobs_of) if logprobs_of is not None and not is_chat else None
        )
        self.head = self._open + self._content
        self.tail = (
            self._close_delta
            + b',"logprobs":null,"finish_reason":null}]'
            + self._null_usage
            + b"}\n\n"
        )

    @property
    def is_plain(self) -> bool:
        """Whether every text frame is ``head + text + tail``."""
        return self._tokenizer is None and not self._continuous_usage

    def count(self, token_ids: Sequence[int]) -> None:
        """Take the ids of the next tokens, whether or not there is text of them yet."""

    def role(self, usage: Usage) -> bytes:
        """Chat's first chunk, empty for completions."""
        if not self._is_chat:
            return b""
        return self._chunk(b'"role":"assistant","content":""', b"null", b"null", usage)

    def text(self, text: str, logprobs: Sequence[TokenLogprobs], usage: Usage) -> bytes:
        """The chunk of new text, by the general way."""
        return self._chunk(self._content + _dumps(text), self._logprobs(logprobs), b"null", usage)

    def last(self, finish_reason: str, usage: Usage) -> bytes:
        """The chunk that ends the choice; the only one with a ``finish_reason``."""
        return self._chunk(
            b"" if self._is_chat else b'""', b"null", b'"%s"' % finish_reason.encode(), usage
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> bytes:
        if not entries or self._tokenizer is None:
            return b"null"
        if self._completion_logprobs is not None:
            return _dumps(self._completion_logprobs.render(entries))
        return _dumps(chat_logprobs(entries, self._tokenizer))

    def _chunk(self, body: bytes, logprobs: bytes, finish_reason: bytes, usage: Usage) -> bytes:
        usage_json = (
            b',"usage":' + _dumps(usage_content([usage]))
            if self._continuous_usage
            else self._null_usage
        )
        return b"".join(
            (
                self._open,
                body,
                self._close_delta,
                b',"logprobs":',
                logprobs,
                b',"finish_reason":',
                finish_reason,
                b"}]",
                usage_json,
                b"}\n\n",
            )
        )


@dataclass(slots=True)
class Choice:
    """One finished choice of an answer that was not streamed.

    ``message`` is chat's, where it is more than ``text``; ``has_calls`` if there are some in it.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprobs]
    message: dict[str, Any] | None = None
    has_calls: bool = False


def whole_answer(
    envelope: Envelope, choices: Sequence[Choice], *, logprobs_of: Tokenizer | None
) -> bytes:
    """The JSON of an answer that was not streamed."""
    content = {
        "id": envelope.id,
        "object": envelope.kind.object,
        "created": envelope.created,
        "model": envelope.model,
        "choices": [
            _whole_choice(envelope.kind, index, choice, logprobs_of)
            for index, choice in enumerate(choices)
        ],
        "usage": usage_content([choice.usage for choice in choices]),
    }
    return _dumps(content)


def _whole_choice(
    kind: Kind, index: int, choice: Choice, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    logprobs: dict[str, Any] | None = None
    if tokenizer is not None:
        logprobs = (
            chat_logprobs(choice.logprobs, tokenizer)
            if kind.is_chat
            else CompletionLogprobs(tokenizer).render(choice.logprobs)
        )
    said: dict[str, Any] = {"text": choice.text}
    if kind.is_chat:
        plain = {"role": "assistant", "content": choice.text, "refusal": None}
        said = {"message": choice.message or plain}
    finish_reason = openai_finish_reason(choice.finish_reason, has_calls=choice.has_calls)
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}


def openai_finish_reason(finish_reason: str, *, has_calls: bool) -> str:
    """OpenAI's name for an end: calls are a reason to stop."""
    return "tool_calls" if has_calls and finish_reason == FinishReason.STOP else finish_reason
