"""Messages of exactly so many tokens, as the server's own chat template and tokenizer count."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Protocol

from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.tokenizer import FastTokenizer

Message = dict[str, str]

_WORD = re.compile(r" [a-z]{2,6}")
_MAX_WORDS = 2000
_MIN_WORDS = 100
_MAX_CORRECTIONS = 8


class PromptMaker(Protocol):
    """Writes messages of a wanted length."""

    def fill(self, history: list[Message], role: str, tokens: int, rng: random.Random) -> Message:
        """A message of ``role`` that adds ``tokens`` to ``history``, template included.

        A user's message counts the opening of the answer too. Shorter than that opening it cannot
        be: it then holds no word.
        """


class ExactPrompts:
    """Random words, each one token, in the checkpoint's own template."""

    def __init__(self, tokenizer: FastTokenizer | ByteTokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._words = _one_token_words(tokenizer)

    @classmethod
    def from_directory(cls, path: Path) -> ExactPrompts:
        """Read tokenizer and template of a checkpoint. Raises ``ModelLoadError``."""
        tokenizer = FastTokenizer.from_directory(path)
        template = ChatTemplate.from_directory(
            path,
            special_tokens=tokenizer.special_tokens,
            token_id=tokenizer.token_to_id,
        )
        return cls(tokenizer, template)

    def count(self, messages: list[Message], *, opens_answer: bool) -> int:
        """Tokens of a templated prompt."""
        if not messages:
            return 0
        text = self._template.render(messages, add_generation_prompt=opens_answer)
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def fill(self, history: list[Message], role: str, tokens: int, rng: random.Random) -> Message:
        opens_answer = role == "user"
        target = self.count(history, opens_answer=False) + tokens
        words: list[str] = []
        for _ in range(_MAX_CORRECTIONS):
            message = {"role": role, "content": "".join(words)}
            missing = target - self.count([*history, message], opens_answer=opens_answer)
            if missing > 0:
                words.extend(rng.choice(self._words) for _ in range(missing))
            elif missing < 0 and words:
                del words[missing:]
            else:
                break
        return {"role": role, "content": "".join(words)}


class WordPrompts:
    """Without the server's tokenizer: a word for a token. The server's ``usage`` says how many."""

    def fill(self, history: list[Message], role: str, tokens: int, rng: random.Random) -> Message:
        del history
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ("".join(rng.choices(letters, k=3)) for _ in range(tokens))
        return {"role": role, "content": " ".join(words)}


def _one_token_words(tokenizer: FastTokenizer | ByteTokenizer) -> list[str]:
    """Words with a space before them that are one token each; letters if there are few such."""
    order = list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(order)
    words = []
    for token_id in order:
        text = tokenizer.token_text(token_id)
        if _WORD.fullmatch(text) and tokenizer.encode(text, add_special_tokens=False) == [token_id]:
            words.append(text)
            if len(words) == _MAX_WORDS:
                return words
    return words if len(words) >= _MIN_WORDS else list("abcdefghijklmnopqrstuvwxyz")
