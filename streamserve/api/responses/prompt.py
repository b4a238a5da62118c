"""A request whose prompt does not fit may lose its beginning: ``truncation: "auto"``."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from streamserve.api.chat_request import ChatRequest
from streamserve.api.responses.request import ResponsesRequest


def attempts(request: ResponsesRequest, max_model_len: int) -> Generator[ChatRequest, int, None]:
    """The chats to render, until one is right: that is the last. Each is answered with its size
    in tokens.

    What goes are whole turns from the beginning, up to a user's message; what the system says
    stays. If nothing fits, the last turn is left, and refused like any that is too long.
    """
    chat = request.chat
    limit = max_model_len - (chat.params.max_tokens or 1)
    size = yield chat
    if size <= limit or not request.truncates:
        return
    starts = [i for i, message in enumerate(chat.messages) if message["role"] == "user"]
    low, high, last = 0, len(starts) - 1, -1
    while low < high:
        last = (low + high) // 2
        size = yield _beginning_at(chat, starts[last])
        if size <= limit:
            high = last
        else:
            low = last + 1
    if starts and last != low:
        yield _beginning_at(chat, starts[low])


def _beginning_at(chat: ChatRequest, start: int) -> ChatRequest:
    kept = [message for message in chat.messages[:start] if message["role"] == "system"]
    return replace(chat, messages=(*kept, *chat.messages[start:]))
