"""Where a tokenizer and a chat template come from: what a worker process loads them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from streamserve.config import TextFiles
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.tokenizer import FastTokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class TextSource:
    """A checkpoint's directory, or ``files`` in place of it, and the template to take instead.

    ``backend`` makes the tokenizer in place of ``tokenizer.json``: one for `FastTokenizer`, or a
    whole `Tokenizer`; it is pickled.
    ``trusts_requests`` lets requests bring templates of their own, ``trusts_messages`` leaves the
    special tokens that somebody typed what they are.
    """

    directory: Path
    chat_template: str | None = None
    backend: Callable[[], tokenizers.Tokenizer | Tokenizer] | None = None
    trusts_requests: bool = False
    trusts_messages: bool = False
    files: TextFiles | None = None

    def __call__(self) -> tuple[Tokenizer, ChatTemplate]:
        """Load both. Raises ``ModelLoadError`` or ``ConfigError``."""
        tokenizer, template = self._of_directory() if self.files is None else self._of_files()
        template.trusts_requests = self.trusts_requests
        template.trusts_messages = self.trusts_messages
        return tokenizer, template

    def _of_directory(self) -> tuple[Tokenizer, ChatTemplate]:
        tokenizer = self._tokenizer()
        template = ChatTemplate.from_directory(
            self.directory,
            override=self.chat_template,
            special_tokens=tokenizer.special_tokens,
            token_id=tokenizer.token_to_id,
        )
        return tokenizer, template

    def _tokenizer(self) -> Tokenizer:
        if self.backend is None:
            return FastTokenizer.from_directory(self.directory)
        made = self.backend()
        if not isinstance(made, tokenizers.Tokenizer):
            return made
        return FastTokenizer.from_directory(self.directory, backend=made)

    def _of_files(self) -> tuple[FastTokenizer, ChatTemplate]:
        assert self.files is not None
        backend = tokenizers.Tokenizer.from_str(self.files.tokenizer)
        tokenizer = FastTokenizer.from_config(backend, self.files.config)
        template = ChatTemplate.from_config(
            self.files.config,
            self.files.source,
            override=self.chat_template,
            special_tokens=tokenizer.special_tokens,
            model_type=self.files.model_type,
            token_id=tokenizer.token_to_id,
        )
        return tokenizer, template


def byte_text() -> tuple[ByteTokenizer, ChatTemplate]:
    """What a run without a checkpoint has."""
    tokenizer = ByteTokenizer()
    return tokenizer, ChatTemplate.builtin("plain", special_tokens=tokenizer.special_tokens)
