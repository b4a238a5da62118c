"""From what a client sent to token ids, off the event loop unless it is short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from streamserve.core.interruptible import Interruptible
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.bad_words import spell_bad_words
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.controls import Controls
from streamserve.engine.template_turns import Message
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import InvalidParameterError

_T = TypeVar("_T")

INLINE_CHARACTERS = 128
"""Up to here encoding costs less (about 60 µs) than the way to another thread and back."""

_MESSAGE_CHARACTERS = 16
"""To render one more message costs as much as to encode this many characters."""


class ChatPrompt(NamedTuple):
    """A rendered chat and its token ids."""

    text: str
    token_ids: list[int]


class PromptEncoder:
    """Renders and tokenises on the caller's thread."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        trusts = chat_template is not None and chat_template.trusts_messages
        self._controls = None if trusts else Controls(tokenizer)
        self._salt = ""

    def of(self, salt: str) -> PromptEncoder:
        """The same, which remembers long texts apart from those of others."""
        if salt == self._salt:
            return self
        encoder = copy(self)
        encoder._salt = salt
        return encoder

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, salt=self._salt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, special tokens included.

        Raises ``InvalidParameterError`` for an id that the vocabulary lacks.
        """
        limit, highest = self._tokenizer.vocab_size - 1, max(token_ids, default=0)
        if highest > limit:
            raise InvalidParameterError(
                f"tokens must hold token ids from 0 to {limit}, got {highest}", param="tokens"
            )
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def id_to_token(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return [self._tokenizer.id_to_token(token_id) for token_id in token_ids]

    def chat(
        self, messages: Sequence[Message], /, *, add_special_tokens: bool = False, **options: Any
    ) -> ChatPrompt:
        """Render ``messages`` (``options`` are ``ChatTemplate.render``'s) and tokenise the result.

        Special tokens in what anybody but the assistant has said are text, unless the template
        ``trusts_messages``. Raises ``InvalidParameterError``: what the template says against the
        messages, or no template at all.
        """
        if self._chat_template is None:
            raise InvalidParameterError("this model has no chat template", param="messages")
        controls = self._controls
        messages, hidden = (messages, None) if controls is None else controls.hide(messages)
        text = self._chat_template.render(messages, **options)
        if controls is None or not hidden:
            return ChatPrompt(text, self.encode(text, add_special_tokens=add_special_tokens))
        return ChatPrompt(*controls.encode(text, hidden, add_special_tokens=add_special_tokens))


class Preprocessor:
    """Renders and tokenises on a small thread pool, with a time limit. Event-loop thread only.

    ``tokenizers`` releases the interpreter lock; Jinja does not, but a chat of ordinary length
    renders in well under a millisecond. Without threads everything happens at once, without a
    limit: no method then waits, and any one thread may have it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None = None,
        *,
        timeout_s: float = 10.0,
        num_threads: int = 2,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, chat_template)
        self.has_run_away = False  # whether something took longer than it may
        self._may_render_here = chat_template is None or chat_template.is_tame
        self._timeout_s = timeout_s
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, salt: str = ""
    ) -> list[int]:
        """Token ids of ``text``. Raises ``InvalidParameterError`` past the time limit.

        Texts with another ``salt`` have no part in how long it takes.
        """
        encoder = self._encoder.of(salt)
        work = partial(encoder.encode, text, add_special_tokens=add_special_tokens)
        return await self._run(work, num_characters=len(text), param="prompt")

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, special tokens included. Raises as ``encode``."""
        work = partial(self._encoder.decode, token_ids)
        return await self._run(work, num_characters=len(token_ids), param="tokens")

    async def id_to_token(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it. Raises as ``encode``."""
        work = partial(self._encoder.id_to_token, token_ids)
        return await self._run(work, num_characters=len(token_ids), param="return_token_strs")

    async def chat(
        self,
        messages: Sequence[Message],
        salt: str = "",
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> ChatPrompt:
        """Render ``messages`` and tokenise the result; ``salt`` as of ``encode``.

        Raises ``InvalidParameterError``: what the template says against the messages, no template
        at all, or the time limit.
        """
        work = partial(
            self._encoder.of(salt).chat,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            add_special_tokens=add_special_tokens,
            tools=tools,
            **kwargs,
        )
        if tools or "chat_template" in kwargs or not self._may_render_here:
            size = INLINE_CHARACTERS + 1
        else:
            size = sum(_size_of(message) for message in messages)
        return await self._run(work, num_characters=size, param="messages")

    async def bad_words(self, params: SamplingParams) -> SamplingParams:
        """``params`` with its bad words spelt as token ids."""
        words = params.bad_words
        if not words:
            return params

        def work() -> SamplingParams:
            return replace(params, bad_word_ids=spell_bad_words(self._tokenizer, words))

        size = sum(len(word) + INLINE_CHARACTERS // 2 for word in words)
        return await self._run(work, num_characters=size, param="bad_words")

    def close(self) -> None:
        """Let go of the threads. Idempotent; does not wait for work that runs."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    async def _run(self, work: Callable[[], _T], *, num_characters: int, param: str) -> _T:
        if num_characters <= INLINE_CHARACTERS or not self._num_threads:
            return work()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="preprocess")
        running = Interruptible(work)
        future = asyncio.get_running_loop().run_in_executor(self._pool, running)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await future
        except TimeoutError:
            # What does not let itself be interrupted keeps its pool, so that it delays nobody else.
            self.close()
            running.interrupt()
            self.has_run_away = True
            raise InvalidParameterError(
                f"{param} took longer than the limit of {self._timeout_s:g} s to render and "
                "tokenise",
                param=param,
            ) from None


def _size_of(message: Message) -> int:
    """Characters, and what a message costs besides; anything but plain text counts as long."""
    content = message.get("content")
    if not isinstance(content, str) or len(message) > 2:
        return INLINE_CHARACTERS + 1
    return len(content) + _MESSAGE_CHARACTERS
