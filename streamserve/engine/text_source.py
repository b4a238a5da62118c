"""Where a tokenizer and a chat template come from: what a worker process loads them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.tokenizer import FastTokenizer


@dataclass(frozen=True, slots=True)
class TextSource:
    """A checkpoint's directory, and the template to take instead of its own.

    ``backend`` makes the tokenizer where there is no ``tokenizer.json``; it is pickled.
    ``trusts_requests`` lets requests bring templates of their own, ``trusts_messages`` leaves the
    special tokens that somebody typed what they are.
    """

    directory: Path
    chat_template: str | None = None
    backend: Callable[[], tokenizers.Tokenizer] | None = None
    trusts_requests: bool = False
    trusts_messages: bool = False

    def __call__(self) -> tuple[FastTokenizer, ChatTemplate]:
        """Load both. Raises ``ModelLoadError`` or ``ConfigError``."""
        tokenizer = FastTokenizer.from_directory(self.directory, backend=self.backend)
        template = ChatTemplate.from_directory(
            self.directory,
            override=self.chat_template,
            special_tokens=tokenizer.special_tokens,
            has_token=lambda token: tokenizer.token_to_id(token) is not None,
        )
        template.trusts_requests = self.trusts_requests
        template.trusts_messages = self.trusts_messages
        return tokenizer, template


def byte_text() -> tuple[ByteTokenizer, ChatTemplate]:
    """What a run without a checkpoint has."""
    tokenizer = ByteTokenizer()
    return tokenizer, ChatTemplate.builtin("plain", special_tokens=tokenizer.special_tokens)
