"""What the chat template makes of a system prompt, before anybody has said a word."""

from __future__ import annotations

from streamserve.core.prefix_cache import num_common_tokens
from streamserve.engine.preprocess import PromptEncoder

_WORDS = ("a", "7", "é", "<", "好", "\n", " x")
"""First words that have nothing in common, so that no token of theirs is taken for the prefix's."""


def system_prefix(encoder: PromptEncoder, system: str) -> list[int]:
    """The token ids that every chat with this system prompt begins with.

    Raises ``InvalidParameterError`` if the template knows no system prompts.
    """
    chats = [
        encoder.chat([{"role": "system", "content": system}, {"role": "user", "content": word}])
        for word in _WORDS
    ]
    found = chats[0].token_ids
    for chat in chats[1:]:
        found = found[: num_common_tokens(found, chat.token_ids)]
    return found
