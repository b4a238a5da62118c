"""Several events of an answer as one chunk: a stream that can be resumed has one id for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from streamserve.engine.parsers.events import CallArguments, CallStart, Content, Event, Reasoning

_dumps = orjson.dumps


def chat_delta(events: Sequence[Event]) -> bytes:
    """The inside of a chat chunk's delta that says all of ``events``."""
    parts: list[bytes] = []
    if reasoning := "".join([e.text for e in events if isinstance(e, Reasoning)]):
        text = _dumps(reasoning)
        parts.append(b'"reasoning_content":' + text + b',"reasoning":' + text)
    if content := content_of(events):
        parts.append(b'"content":' + _dumps(content))
    if calls := _calls_of(events):
        parts.append(b'"tool_calls":' + _dumps(calls))
    return b",".join(parts)


def content_of(events: Sequence[Event]) -> str:
    """The text of the answer itself."""
    return "".join([event.text for event in events if isinstance(event, Content)])


def _calls_of(events: Sequence[Event]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            calls[event.call_index] = {
                "index": event.call_index,
                "id": event.call_id,
                "type": "function",
                "function": function,
            }
        elif isinstance(event, CallArguments):
            index = event.call_index
            call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
            call["function"]["arguments"] += event.text
    return list(calls.values())
