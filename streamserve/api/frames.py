r"""The bytes of OpenAI's answers. A streamed token costs one string dump between two constants.

::

    data: {"id":…,"choices":[{"index":0,"delta":{"content":   "Hi"   },"logprobs":null,…}]}\n\n
    |<------------------- head ------------------------->|<-text->|<-------- tail -------->|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import orjson

from streamserve.api.extras import NO_EXTRAS, Extras, Prompt
from streamserve.api.logprobs import chat_logprobs
from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_NO_PROMPT = Prompt([])

_dumps = orjson.dumps


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs on the wire between the two endpoints."""

    id_prefix: str
    object: str
    chunk_object: str
    is_chat: bool
    role: str = "assistant"  # of chat answers


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


def usage_content(usages: Sequence[Usage], n: int = 1) -> dict[str, Any]:
    """The ``usage`` object over all choices of an answer, ``n`` of them for each prompt."""
    of_prompts = usages[::n]
    prompt = sum(u.prompt_tokens for u in of_prompts)
    completion = sum(u.completion_tokens for u in usages)
    content: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in of_prompts)},
    }
    thought = [u.reasoning_tokens for u in usages if u.reasoning_tokens is not None]
    if thought:
        content["completion_tokens_details"] = {"reasoning_tokens": sum(thought)}
    return content


def usage_frame(envelope: Envelope, usages: Sequence[Usage], n: int = 1) -> bytes:
    """The chunk after the last one that ``include_usage`` asks for: no choices, all usage."""
    head = b"data: " + envelope.head(envelope.kind.chunk_object)
    return head + b'"choices":[],"usage":' + _dumps(usage_content(usages, n)) + b"}\n\n"


def error_frame(status: int, content: dict[str, Any]) -> bytes:
    """The event that ends a stream which failed; ``status`` is what it would have had."""
    return b"data: " + _dumps({"error": {**content, "status": status}}) + b"\n\n"


class FrameOptions(TypedDict, total=False):
    """What ``ChoiceFrames`` may be told."""

    include_usage: Required[bool]
    continuous_usage: bool
    prompt: Prompt
    extras: Extras


class ChoiceFrames:
    """Renders the chunks of one choice. ``head`` and ``tail`` are for the fast path: a text frame
    is ``head + orjson.dumps(text) + tail`` unless extras or running usage were asked for.
    """

    late_sink = None

    def __init__(
        self,
        envelope: Envelope,
        index: int,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        prompt: Prompt = _NO_PROMPT,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        is_chat = envelope.kind.is_chat
        self._is_chat = is_chat
        self._role = _dumps(envelope.kind.role)
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
        self._prompt = prompt
        self._extras = extras
        self._completion_logprobs = None if is_chat else extras.completion_logprobs(prompt)
        self._owes_echo = bool(prompt.echo) and not is_chat
        self._owes_prompt_ids = extras.token_ids
        # What came and was not shown yet: it waits for the text that it belongs to.
        self._held_logprobs: list[TokenLogprobs] = []
        self._held_ids: list[int] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self.head = self._open + self._content
        self.tail = (
            self._close_delta
            + b',"logprobs":null,"finish_reason":null}]'
            + self._null_usage
            + b"}\n\n"
        )

    @property
    def is_chat(self) -> bool:
        """Whether text stands in a delta."""
        return self._is_chat

    @property
    def is_plain(self) -> bool:
        """Whether every text frame is ``head + text + tail``."""
        return self._extras.are_none and not self._continuous_usage

    @property
    def holds_any(self) -> bool:
        """Whether something waits for text."""
        return bool(self._held_logprobs or self._held_ids)

    def hold(self, output: RequestOutput) -> None:
        """Keep what an output has besides its text for the next chunk."""
        self._held_logprobs += output.logprobs
        if self._extras.token_ids:
            self._held_ids += output.token_ids
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs

    def role(self, usage: Usage) -> bytes:
        """Chat's first chunk, empty for completions."""
        if not self._is_chat:
            return b""
        body = b'"role":' + self._role + b',"content":""'
        return self._chunk(body, b"null", b"null", usage, at_end=self._prompt_ids())

    def echo_at_once(self, usage: Usage) -> bytes:
        """The chunk that repeats the prompt, unless it waits for the prompt's logprobs, or none."""
        if self._completion_logprobs is not None:
            return b""
        return self._echo(usage)

    def text(self, text: str, usage: Usage) -> bytes:
        """The chunk of new text and of what was held, by the general way."""
        entries, self._held_logprobs = self._held_logprobs, []
        before = self._echo(usage)
        return before + self._chunk(
            self._content + _dumps(text), self._logprobs(entries), b"null", usage, self._ids()
        )

    def last(self, finish_reason: str, usage: Usage, timing: dict[str, Any] | None = None) -> bytes:
        """The chunk that ends the choice; the only one with a ``finish_reason``."""
        body = b"" if self._is_chat else b'""'
        ending = b'"%s"' % finish_reason.encode()
        if timing is not None:
            ending += b',"timing":' + _dumps(timing)
        return self._echo(usage) + self._chunk(body, b"null", ending, usage, self._ids())

    def chunk_of(self, body: bytes) -> bytes:
        """The chunk of a delta, or a text, that was rendered before; not with running usage."""
        return self._chunk(body, b"null", b"null", Usage(0))

    def _echo(self, usage: Usage) -> bytes:
        """The chunk that repeats the prompt, once."""
        if not self._owes_echo:
            return b""
        self._owes_echo = False
        logprobs = b"null"
        if self._completion_logprobs is not None:
            entries = self._prompt_logprobs or ()
            logprobs = _dumps(self._completion_logprobs.echo(self._prompt.echo, entries))
        return self._chunk(_dumps(self._prompt.echo), logprobs, b"null", usage)

    def _ids(self) -> bytes:
        """The token ids of a chunk, and before the first of a completion the prompt's."""
        if not self._extras.token_ids:
            return b""
        ids, self._held_ids = self._held_ids, []
        # A chat's stand in its first chunk, which is made after the text that it travels with.
        of_prompt = b"" if self._is_chat else self._prompt_ids()
        return of_prompt + b',"token_ids":' + _dumps(ids)

    def _prompt_ids(self) -> bytes:
        """The prompt's token ids, once, if they were asked for."""
        if not self._owes_prompt_ids:
            return b""
        self._owes_prompt_ids = False
        return b',"prompt_token_ids":' + _dumps(self._prompt.token_ids)

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> bytes:
        names = self._extras.names
        if not entries or names is None:
            return b"null"
        if self._completion_logprobs is not None:
            return _dumps(self._completion_logprobs.render(entries))
        return _dumps(chat_logprobs(entries, names))

    def _chunk(
        self,
        body: bytes,
        logprobs: bytes,
        finish_reason: bytes,
        usage: Usage,
        in_choice: bytes = b"",
        at_end: bytes = b"",
    ) -> bytes:
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
                in_choice,
                b"}]",
                usage_json,
                at_end,
                b"}\n\n",
            )
        )


def openai_finish_reason(finish_reason: str, *, has_calls: bool) -> str:
    """OpenAI's name for an end: calls are a reason to stop."""
    return "tool_calls" if has_calls and finish_reason == FinishReason.STOP else finish_reason
