"""What a user types is text: ``<|im_end|>`` in a message must not end it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from streamserve.engine.chat_template import Message
from streamserve.engine.tokenizer import Tokenizer

_BREAK = "\u200b"  # no width: a reader sees what was typed
_UNTRUSTED = frozenset({"user", "tool"})
_MIN_CHARACTERS = 3  # a shorter one is found in anybody's text


class Controls:
    """A vocabulary's special tokens, and messages in which nobody has typed one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {tokenizer.id_to_token(i) for i in tokenizer.all_special_ids}
        names = {name for name in names if len(name) >= _MIN_CHARACTERS}
        # Hundreds of names begin in a few ways: nearly every text is known to hold none by these.
        self._beginnings = sorted({name[:2] for name in names})
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if names else None

    def defused(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The same, with special tokens in users' and tools' words broken in two."""
        if self._pattern is None:
            return messages
        found = [self._defused(message) for message in messages]
        return found if any(a is not b for a, b in zip(found, messages, strict=True)) else messages

    def _defused(self, message: Message) -> Message:
        if message.get("role") not in _UNTRUSTED:
            return message
        content = message.get("content")
        if isinstance(content, str):
            text: Any = self._text(content)
        elif isinstance(content, (list, tuple)):
            text = [
                {**part, "text": self._text(part["text"])} if "text" in part else part
                for part in content
            ]
            text = content if list(content) == text else text
        else:
            return message
        return message if text is content else {**message, "content": text}

    def _text(self, text: str) -> str:
        if self._pattern is None or not any(start in text for start in self._beginnings):
            return text
        broken = self._pattern.sub(lambda m: m[0][0] + _BREAK + m[0][1:], text)
        return text if broken == text else broken
