"""The chunks, or the message, of a choice whose text holds thoughts or tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from streamserve.api.frames import Choice, ChoiceFrames, Envelope, openai_finish_reason
from streamserve.core.plan import TokenLogprobs
from streamserve.engine.outputs import Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import (
    CallArguments,
    CallStart,
    Content,
    Event,
    ParsedMessage,
    ToolCall,
)
from streamserve.engine.tokenizer import Tokenizer

_dumps = orjson.dumps


class ParsedFrames(ChoiceFrames):
    """As ``ChoiceFrames``, through a parser: there may be none or several chunks for a text.

    The role travels with the first of them. Logprobs of held-back text come with the next chunk.
    """

    def __init__(
        self,
        envelope: Envelope,
        index: int,
        parser: AnswerParser,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        logprobs_of: Tokenizer | None = None,
    ) -> None:
        super().__init__(
            envelope,
            index,
            include_usage=include_usage,
            continuous_usage=continuous_usage,
            logprobs_of=logprobs_of,
        )
        self._parser = parser
        self._has_begun = False
        self._held: list[TokenLogprobs] = []

    @property
    def is_plain(self) -> bool:
        return False

    def count(self, token_ids: Sequence[int]) -> None:
        self._parser.count(token_ids)

    def role(self, usage: Usage) -> bytes:
        return b""

    def text(self, text: str, logprobs: Sequence[TokenLogprobs], usage: Usage) -> bytes:
        self._held += logprobs
        return self._render(self._parser.feed(text), usage)

    def last(self, finish_reason: str, usage: Usage) -> bytes:
        events = self._parser.finish()
        if not events and (self._held or not self._has_begun):
            events = [Content("")]
        body = self._render(events, usage)
        has_calls = self._parser.num_calls > 0
        return body + super().last(openai_finish_reason(finish_reason, has_calls=has_calls), usage)

    def _render(self, events: Sequence[Event], usage: Usage) -> bytes:
        usage.reasoning_tokens = self._parser.num_reasoning_tokens
        frames: list[bytes] = []
        for event in events:
            body = _delta(event)
            if not self._has_begun:
                self._has_begun = True
                content = b"" if isinstance(event, Content) else b'"content":null,'
                body = b'"role":"assistant",' + content + body
            frames.append(self._chunk(body, self._logprobs(self._held), b"null", usage))
            self._held = []
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


def parse_choice(choice: Choice, parser: AnswerParser) -> None:
    """Fill in the message of a choice that was not streamed. The parser has counted its tokens."""
    message = ParsedMessage()
    message.add(parser.feed(choice.text))
    message.add(parser.finish())
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
    choice.message = shown
    choice.has_calls = bool(message.calls)
    choice.usage.reasoning_tokens = parser.num_reasoning_tokens


def _shown_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}
