"""Items as the messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from streamserve.api.responses.items import Item, unseal

Message = dict[str, Any]

_ROLES = {"developer": "system", "system": "system", "user": "user"}


def chat_messages(instructions: str | None, items: Iterable[Item]) -> tuple[Message, ...]:
    """The chat that items make.

    What an assistant thought, said and called stands in one message as far as a chat knows it:
    thoughts before words before calls.
    """
    messages: list[Message] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    turn: Message | None = None  # the assistant's, to which what follows may belong
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] != "assistant":
            turn = None
            messages.append({"role": _ROLES[item["role"]], "content": _content(item["content"])})
        elif kind == "function_call_output":
            turn = None
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": item["call_id"],
                    "content": _content(item["output"]),
                }
            )
        elif kind == "function_call" and item.get("status") == "incomplete":
            continue  # it was cut: nobody can have answered it
        else:
            if turn is None or not _may_follow(kind, turn):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add(item, turn)
    return tuple(messages)


def _may_follow(kind: str, turn: Message) -> bool:
    if kind == "function_call":
        return True
    has_said = bool(turn["content"]) or "tool_calls" in turn
    return not has_said and (kind == "message" or "reasoning" not in turn)


def _add(item: Item, turn: Message) -> None:
    kind = item["type"]
    if kind == "message":
        turn["content"] = _content(item["content"])
    elif kind == "reasoning":
        if thoughts := _thoughts(item):
            # Templates know one name or the other.
            turn["reasoning"] = turn["reasoning_content"] = thoughts
    else:
        arguments = orjson.loads(item["arguments"]) if item["arguments"].strip() else {}
        call = {"name": item["name"], "arguments": arguments}
        turn.setdefault("tool_calls", []).append(
            {"id": item["call_id"], "type": "function", "function": call}
        )


def _content(content: str | list[dict[str, Any]]) -> str | list[dict[str, str]]:
    """As chats have it: one text as a string, which is what templates know best."""
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content]
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return texts[0] if texts else ""


def _thoughts(item: Item) -> str:
    for name in ("content", "summary"):
        texts = [part["text"] for part in item.get(name) or ()]
        if texts:
            return "\n".join(texts)
    return unseal(item.get("encrypted_content") or "") or ""
