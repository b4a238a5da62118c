"""The items of an answer while they are written, and the events that tell of them.

An event is its name and the inside of its JSON; who sends it adds type and number. Its delta is
made of a template: nothing else is rendered for a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import orjson

from streamserve.api.responses.items import seal

_dumps = orjson.dumps

IN_PROGRESS = "in_progress"


class TypedEvent(NamedTuple):
    """``name`` is its type; ``body`` what follows the sequence number, from a comma on."""

    name: bytes
    body: bytes


class OpenItem(ABC):
    """An output item. Its text, or its arguments, come piece by piece."""

    prefix: str  # of ids
    delta_name: bytes
    done_name: bytes
    _text_name: bytes  # of the field in which the done event has the whole
    _content_index = b""

    def __init__(self, item_id: str, output_index: int) -> None:
        self.id = item_id
        self._index = b',"output_index":%d' % output_index
        self._place = b',"item_id":' + _dumps(item_id) + self._index + self._content_index
        self.delta_head = self._place + b',"delta":'
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)

    def opening(self) -> list[TypedEvent]:
        """What precedes the first delta."""
        item = b',"item":' + _dumps(self.content(IN_PROGRESS, is_empty=True))
        events = [TypedEvent(b"response.output_item.added", self._index + item)]
        if (part := self.part("")) is not None:
            events.append(self._of_part(b"added", part))
        return events

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> TypedEvent:
        """More of it, which the item takes."""
        self.pieces.append(text)
        return TypedEvent(
            self.delta_name, self.delta_head + _dumps(text) + self.delta_tail(logprobs)
        )

    def closing(self, status: str) -> list[TypedEvent]:
        """What follows the last delta."""
        text = self.text
        whole = b',"%b":' % self._text_name + _dumps(text)
        events = [TypedEvent(self.done_name, self._place + whole + self.done_tail())]
        if (part := self.part(text)) is not None:
            events.append(self._of_part(b"done", part))
        item = b',"item":' + _dumps(self.content(status))
        events.append(TypedEvent(b"response.output_item.done", self._index + item))
        return events

    def delta_tail(self, logprobs: list[dict[str, Any]]) -> bytes:
        """What a delta has behind its text."""
        return b""

    def done_tail(self) -> bytes:
        """What the done event has behind the text."""
        return b""

    def part(self, text: str) -> dict[str, Any] | None:
        """The content part with ``text``, if this kind of item has parts."""
        return None

    @abstractmethod
    def content(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        """The item as it is now; ``is_empty``: before its first part."""

    def _of_part(self, what: bytes, part: dict[str, Any]) -> TypedEvent:
        return TypedEvent(
            b"response.content_part." + what, self._place + b',"part":' + _dumps(part)
        )


class MessageItem(OpenItem):
    """What the model says."""

    prefix = "msg"
    delta_name = b"response.output_text.delta"
    done_name = b"response.output_text.done"
    _text_name = b"text"
    _content_index = b',"content_index":0'
    plain_tail = b',"logprobs":[]'

    def __init__(self, item_id: str, output_index: int) -> None:
        super().__init__(item_id, output_index)
        self._logprobs: list[dict[str, Any]] = []

    def delta_tail(self, logprobs: list[dict[str, Any]]) -> bytes:
        if not logprobs:
            return self.plain_tail
        self._logprobs += logprobs
        return b',"logprobs":' + _dumps(logprobs)

    def done_tail(self) -> bytes:
        return b',"logprobs":' + _dumps(self._logprobs)

    def part(self, text: str) -> dict[str, Any]:
        logprobs = self._logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def content(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if is_empty else [self.part(self.text)],
        }


class ReasoningItem(OpenItem):
    """What the model thinks."""

    prefix = "rs"
    delta_name = b"response.reasoning_text.delta"
    done_name = b"response.reasoning_text.done"
    _text_name = b"text"
    _content_index = b',"content_index":0'

    def __init__(self, item_id: str, output_index: int, *, is_sealed: bool) -> None:
        super().__init__(item_id, output_index)
        self._is_sealed = is_sealed

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}

    def content(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        parts = [] if is_empty else [self.part(self.text)]
        item: dict[str, Any] = {"id": self.id, "type": "reasoning", "status": status}
        item |= self._parts(parts)
        if self._is_sealed:
            item["encrypted_content"] = None if is_empty else seal(self.text)
        return item

    def _parts(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"summary": [], "content": parts}


class SummaryItem(ReasoningItem):
    """The same, told as the summary that was asked for."""

    delta_name = b"response.reasoning_summary_text.delta"
    done_name = b"response.reasoning_summary_text.done"
    _content_index = b',"summary_index":0'

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "summary_text", "text": text}

    def _parts(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"summary": parts}

    def _of_part(self, what: bytes, part: dict[str, Any]) -> TypedEvent:
        name = b"response.reasoning_summary_part." + what
        return TypedEvent(name, self._place + b',"part":' + _dumps(part))


class CallItem(OpenItem):
    """A function that the model calls."""

    prefix = "fc"
    delta_name = b"response.function_call_arguments.delta"
    done_name = b"response.function_call_arguments.done"
    _text_name = b"arguments"

    def __init__(
        self, item_id: str, output_index: int, call_id: str, name: str, namespace: str | None
    ) -> None:
        super().__init__(item_id, output_index)
        self._call_id = call_id
        self._name = name
        self._namespace = {} if namespace is None else {"namespace": namespace}

    def done_tail(self) -> bytes:
        return b',"name":' + _dumps(self._name)

    def content(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            **self._namespace,
            "arguments": "" if is_empty else self.text,
        }
