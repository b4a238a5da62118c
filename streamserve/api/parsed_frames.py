"""The chunks, or the message, of a choice whose text holds thoughts or tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import orjson

from streamserve.api.frames import ChoiceFrames, Envelope, FrameOptions, openai_finish_reason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    ParsedMessage,
    ToolCall,
)

_dumps = orjson.dumps


class ParsedFrames(ChoiceFrames):
    """As ``ChoiceFrames``, through a parser: there may be none or several chunks for a text.

    The role travels with the first of them. Logprobs of held-back text come with the next chunk.
    """

    def __init__(
        self, envelope: Envelope, index: int, parser: AnswerParser, **options: Unpack[FrameOptions]
    ) -> None:
        super().__init__(envelope, index, **options)
        self._parser = parser
        self._has_begun = False

    @property
    def is_plain(self) -> bool:
        return False

    def hold(self, output: RequestOutput) -> None:
        super().hold(output)
        self._parser.count(output.token_ids)

    def role(self, usage: Usage) -> bytes:
        return b""

    def text(self, text: str, usage: Usage) -> bytes:
        return self._render(self._parser.feed(text), usage)

    def last(self, finish_reason: str, usage: Usage, timing: dict[str, Any] | None = None) -> bytes:
        events = self._parser.finish()
        if not events and (self.holds_any or not self._has_begun):
            events = [Content("")]
        body = self._render(events, usage)
        reason = openai_finish_reason(finish_reason, has_calls=self._parser.num_calls > 0)
        return body + super().last(reason, usage, timing)

    def _render(self, events: Sequence[Event], usage: Usage) -> bytes:
        usage.reasoning_tokens = self._parser.num_reasoning_tokens
        frames: list[bytes] = []
        for event in events:
            body, of_prompt = _delta(event), b""
            if not self._has_begun:
                self._has_begun = True
                content = b"" if isinstance(event, Content) else b'"content":null,'
                body = b'"role":' + self._role + b"," + content + body
                of_prompt = self._prompt_ids()
            entries, self._held_logprobs = self._held_logprobs, []
            logprobs = self._logprobs(entries)
            frames.append(
                self._chunk(body, logprobs, b"null", usage, self._ids(), at_end=of_prompt)
            )
        return b"".join(frames)


def _delta(event: Event) -> bytes:
    """The inside of a chunk's delta."""
    match event:
        case Content(text):
            return b'"content":' + _dumps(text)
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id, "type": "function", "function": function}
            return b'"tool_calls":' + _dumps([call])
        case CallArguments(index, text):
            return b'"tool_calls":' + _dumps([{"index": index, "function": {"arguments": text}}])
    thoughts = _dumps(event.text)
    # DeepSeek's name and vLLM's newer one: clients look for either.
    return b'"reasoning_content":' + thoughts + b',"reasoning":' + thoughts


def parsed_message(events: Sequence[Event]) -> dict[str, Any]:
    """The message of an answer that was not streamed."""
    message = ParsedMessage()
    message.add(events)
    has_more = bool(message.calls or message.reasoning)
    shown: dict[str, Any] = {
        "role": "assistant",
        "content": message.content or (None if has_more else ""),
        "refusal": None,
    }
    if message.reasoning:
        shown["reasoning_content"] = shown["reasoning"] = message.reasoning
    if message.calls:
        shown["tool_calls"] = [_shown_call(call) for call in message.calls]
    return shown


def _shown_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}
