"""The form in which chat templates expect messages, whichever API they came by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Templates know "system"; OpenAI's newer name for the same voice is mapped to it."""


def text_content(texts: Sequence[str]) -> str | list[dict[str, str]]:
    """One text as a string, which is what templates know best; several as parts."""
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return texts[0] if texts else ""


def call_arguments(text: str) -> dict[str, Any]:
    """The object that ``text`` is.

    What is none (a model's mistake, or cut by ``max_tokens``) stands in ``_raw``: a chat in which
    it has happened could not go on otherwise.
    """
    if not text.strip():
        return {}
    try:
        arguments = orjson.loads(text)
    except orjson.JSONDecodeError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"_raw": text}


def tool_call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call in an assistant's message: its arguments are an object, and not JSON."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def set_thoughts(message: Message, thoughts: str) -> None:
    """What the assistant thought before ``message``: templates know one name or the other."""
    message["reasoning"] = message["reasoning_content"] = thoughts
