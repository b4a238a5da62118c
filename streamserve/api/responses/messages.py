"""Items as the messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streamserve.api.chat_messages import (
    ROLES,
    Message,
    call_arguments,
    set_thoughts,
    text_content,
    tool_call,
)
from streamserve.api.responses.items import Item, unseal
from streamserve.api.responses.tools import qualified


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
            messages.append({"role": ROLES[item["role"]], "content": _content(item["content"])})
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
            set_thoughts(turn, thoughts)
    else:
        name = qualified(item.get("namespace"), item["name"])
        call = tool_call(item["call_id"], name, call_arguments(item["arguments"]))
        turn.setdefault("tool_calls", []).append(call)


def _content(content: str | list[dict[str, Any]]) -> str | list[dict[str, str]]:
    return content if isinstance(content, str) else text_content([p["text"] for p in content])


def _thoughts(item: Item) -> str:
    for name in ("content", "summary"):
        texts = [part["text"] for part in item.get(name) or ()]
        if texts:
            return "\n".join(texts)
    return unseal(item.get("encrypted_content") or "") or ""
