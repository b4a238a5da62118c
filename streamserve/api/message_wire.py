r"""An answer as Anthropic's Messages API writes it: blocks, one after the other.

::

    message_start
      content_block_start  content_block_delta …  content_block_stop     a thought, text, a call
      …
    message_delta          the reason why it stopped, and usage
    message_stop
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from streamserve.api.errors import error_content, message_error
from streamserve.api.extras import Prompt
from streamserve.api.whole import Choice
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    Reasoning,
    joined,
)

MESSAGE_PING = b'event: ping\ndata: {"type":"ping"}\n\n'

_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_TAIL = b"}}\n\n"
_DELTAS = {
    "text": b'{"type":"text_delta","text":',
    "thinking": b'{"type":"thinking_delta","thinking":',
    "tool_use": b'{"type":"input_json_delta","partial_json":',
}
_NO_TEXT: dict[str, Any] = {"type": "text", "text": ""}

_dumps = orjson.dumps


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _dumps({"type": name, **fields}))


def _usage(usage: Usage) -> dict[str, Any]:
    """Input tokens are those that the prefix cache did not hold."""
    content: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens is not None:
        content["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return content


@dataclass(frozen=True, slots=True)
class MessageEnvelope:
    """What a message says besides its blocks. ``max_model_len`` is the longest context."""

    id: str
    model: str
    max_model_len: int

    def message(
        self, usage: Usage, blocks: Sequence[dict[str, Any]], end: dict[str, Any]
    ) -> dict[str, Any]:
        """The whole message; ``end`` as ``end`` returns it."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": blocks,
            **end,
            "usage": {**_usage(usage), "service_tier": "standard"},
        }

    def end(
        self,
        finish_reason: str | None,
        stop_reason: int | str | None,
        usage: Usage,
        *,
        has_calls: bool,
    ) -> dict[str, Any]:
        """Why the answer stopped; all ``None`` while it goes on.

        A stop string comes first: it may have cut a call.
        """
        reason: str | None = None
        stop_sequence = stop_reason if isinstance(stop_reason, str) else None
        if finish_reason == FinishReason.LENGTH:
            is_full = usage.prompt_tokens + usage.completion_tokens >= self.max_model_len
            reason = "model_context_window_exceeded" if is_full else "max_tokens"
        elif stop_sequence is not None:
            reason = "stop_sequence"
        elif finish_reason is not None:
            reason = "tool_use" if has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop_sequence}


class MessageFrames:
    """The events of a message. Without a parser it is one block of text, whose deltas are plain."""

    tail = _TAIL
    late_sink = None

    def __init__(self, envelope: MessageEnvelope, parser: AnswerParser | None) -> None:
        self._envelope = envelope
        self._parser = parser
        self._stop_reason: int | str | None = None
        self._index = -1  # of the block that is open, or was the last
        self._kind: str | None = None  # of the block that is open
        self.head = b""  # of its deltas
        if parser is None:
            self._text_start = self._start(_NO_TEXT)

    @property
    def is_plain(self) -> bool:
        return self._parser is None

    @property
    def holds_any(self) -> bool:
        return False

    def hold(self, output: RequestOutput) -> None:
        self._stop_reason = output.stop_reason
        if self._parser is not None:
            self._parser.count(output.token_ids)

    def role(self, usage: Usage) -> bytes:
        end = self._envelope.end(None, None, usage, has_calls=False)
        start = _event("message_start", message=self._envelope.message(usage, (), end))
        if self._parser is None:
            start += self._text_start
        return start + MESSAGE_PING

    def echo_at_once(self, usage: Usage) -> bytes:
        return b""

    def text(self, text: str, usage: Usage) -> bytes:
        if self._parser is None:
            return self.head + _dumps(text) + _TAIL
        return b"".join([self._render(event) for event in self._parser.feed(text)])

    def last(self, finish_reason: str, usage: Usage, timing: dict[str, Any] | None = None) -> bytes:
        frames: list[bytes] = []
        has_calls = False
        if self._parser is not None:
            frames += [self._render(event) for event in self._parser.finish()]
            usage.reasoning_tokens = self._parser.num_reasoning_tokens
            has_calls = self._parser.num_calls > 0
        if self._index < 0:
            frames.append(self._start(_NO_TEXT))
        frames.append(self._close())
        end = self._envelope.end(finish_reason, self._stop_reason, usage, has_calls=has_calls)
        frames += [_event("message_delta", delta=end, usage=_usage(usage)), _STOP]
        return b"".join(frames)

    def _render(self, event: Event) -> bytes:
        match event:
            case CallStart(_, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return self._close() + self._start(block)
            case CallArguments(_, text):
                return self.head + _dumps(text) + _TAIL
            case Content(text):
                kind, block = "text", _NO_TEXT
            case Reasoning(text):
                kind, block = "thinking", {"type": "thinking", "thinking": "", "signature": ""}
        before = b"" if self._kind == kind else self._close() + self._start(block)
        return before + self.head + _dumps(text) + _TAIL

    def _start(self, block: dict[str, Any]) -> bytes:
        self._index += 1
        self._kind = block["type"]
        self.head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%s'
            % (self._index, _DELTAS[block["type"]])
        )
        return _event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> bytes:
        if self._kind is None:
            return b""
        signed = b""
        if self._kind == "thinking":
            delta = {"type": "signature_delta", "signature": self._envelope.id}
            signed = _event("content_block_delta", index=self._index, delta=delta)
        self._kind = None
        return signed + _event("content_block_stop", index=self._index)


def content_blocks(events: Iterable[Event], signature: str) -> list[dict[str, Any]]:
    """The blocks of an answer, at least one.

    The input of a call that was cut is what a client would make of it: nothing.
    """
    blocks: list[dict[str, Any]] = []
    for event in joined(list(events)):
        match event:
            case Content(text):
                blocks.append({"type": "text", "text": text})
            case Reasoning(text):
                blocks.append({"type": "thinking", "thinking": text, "signature": signature})
            case CallStart(_, call_id, name):
                blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case CallArguments(_, text):
                blocks[-1]["input"] = _input(text)
    return blocks or [_NO_TEXT]


def _input(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


class MessagesWire:
    """One message."""

    def __init__(self, envelope: MessageEnvelope) -> None:
        self._envelope = envelope

    @property
    def id(self) -> str:
        return self._envelope.id

    def frames(self, index: int, prompt: Prompt, parser: AnswerParser | None) -> MessageFrames:
        """The events of the one choice."""
        return MessageFrames(self._envelope, parser)

    def ending(self, usages: Sequence[Usage]) -> bytes:
        """Nothing: ``message_stop`` is a part of the message."""
        return b""

    def failure(self, exc: Exception, usages: Sequence[Usage]) -> bytes:
        """An event of its own; no ``message_stop`` follows."""
        status, content = error_content(exc)
        return b"event: error\ndata: " + _dumps(message_error(status, content)) + b"\n\n"

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The message that is not streamed."""
        [choice] = choices
        envelope, usage = self._envelope, choice.usage
        events = [Content(choice.text)] if choice.events is None else choice.events
        end = envelope.end(
            choice.finish_reason, choice.stop_reason, usage, has_calls=choice.has_calls
        )
        return _dumps(envelope.message(usage, content_blocks(events, envelope.id), end))
