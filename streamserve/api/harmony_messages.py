"""A chat as gpt-oss's template has it: one call in a message, its result behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Message = dict[str, Any]


def harmony_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same chat. Thoughts are in ``thinking``, and so is what was said before a call.

    The template shows the first call of a message alone, takes a result for that of the last call,
    and refuses a call that both thoughts and words precede.
    """
    return tuple(_written(messages))


def _written(messages: Sequence[Message]) -> Iterator[Message]:
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls = message.get("tool_calls")
        if not calls:
            thoughts = message.get("reasoning_content")
            yield {**message, "thinking": thoughts} if thoughts else message
            continue
        end = position
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        yield from _one_by_one(message, calls, list(messages[position:end]))
        position = end


def _one_by_one(message: Message, calls: list[Any], results: list[Message]) -> Iterator[Message]:
    said = (message.get("reasoning_content"), _text_of(message))
    thinking = {"thinking": "\n\n".join(filter(None, said))} if any(said) else {}
    for call in calls:
        yield {**message, "content": "", **thinking, "tool_calls": [call]}
        thinking = {}
        found = [result for result in results if result["tool_call_id"] == call["id"]]
        yield from found
        results = [result for result in results if result not in found]
    yield from results


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
