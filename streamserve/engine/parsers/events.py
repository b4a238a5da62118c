"""What parsers say, and the message that it adds up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


class Content(NamedTuple):
    """Text of the answer itself."""

    text: str


class Reasoning(NamedTuple):
    """Text of what the model thought before it."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins; its arguments follow. Indices count from 0 without a gap."""

    call_index: int
    call_id: str
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments: JSON, put together."""

    call_index: int
    text: str


Event: TypeAlias = Content | Reasoning | CallStart | CallArguments


@dataclass(slots=True)
class ToolCall:
    """One call of a finished message."""

    call_id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ParsedMessage:
    """All that a list of events said."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        """Take the next events."""
        for event in events:
            match event:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStart(_, call_id, name):
                    self.calls.append(ToolCall(call_id, name, ""))
                case CallArguments(index, text):
                    self.calls[index].arguments += text


def joined(events: Sequence[Event]) -> list[Event]:
    """The same with neighbours that continue each other made one, and what is empty left out."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, CallStart):
            result.append(event)
        elif not event.text:
            continue
        elif isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + event.text)
        elif (
            isinstance(event, CallArguments)
            and isinstance(last, CallArguments)
            and event.call_index == last.call_index
        ):
            result[-1] = CallArguments(event.call_index, last.text + event.text)
        else:
            result.append(event)
    return result
