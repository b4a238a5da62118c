"""Rendering and tokenising: the same inline and off the loop, and never for ever."""

import asyncio
import threading

import pytest

from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.preprocess import INLINE_CHARACTERS, Preprocessor
from streamserve.errors import InvalidParameterError


class RecordingTokenizer(ByteTokenizer):
    """Remembers on which threads it was called, and waits for ``gate`` when there is one."""

    def __init__(self, gate=None):
        super().__init__()
        self.threads = []
        self.gate = gate

    def encode(self, text, *, add_special_tokens, salt=None):
        self.threads.append(threading.current_thread())
        if self.gate is not None and len(text) > INLINE_CHARACTERS:
            self.gate.wait()
        return super().encode(text, add_special_tokens=add_special_tokens)


def chat_template():
    return ChatTemplate.builtin("chatml")


@pytest.mark.parametrize("size", [0, 10, INLINE_CHARACTERS, INLINE_CHARACTERS + 1, 100_000])
async def test_a_text_comes_back_whole_and_long_ones_leave_the_loop(size):
    tokenizer = RecordingTokenizer()
    preprocessor = Preprocessor(tokenizer)
    assert await preprocessor.encode("x" * size) == [256, *b"x" * size]
    assert await preprocessor.encode("x" * size, add_special_tokens=False) == list(b"x" * size)
    on_the_loop = tokenizer.threads[0] is threading.main_thread()
    assert on_the_loop == (size <= INLINE_CHARACTERS)
    preprocessor.close()
    preprocessor.close()


@pytest.mark.parametrize("size", [3, 10_000])
async def test_a_chat_is_rendered_and_tokenised(size):
    preprocessor = Preprocessor(ByteTokenizer(), chat_template())
    prompt = await preprocessor.chat([{"role": "user", "content": "x" * size}])
    assert prompt.text == f"<|im_start|>user\n{'x' * size}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.token_ids == list(prompt.text.encode())
    preprocessor.close()


async def test_many_at_once():
    preprocessor = Preprocessor(ByteTokenizer())
    texts = [chr(97 + n) * 1000 for n in range(20)]
    results = await asyncio.gather(*map(preprocessor.encode, texts))
    assert [bytes(ids[1:]).decode() for ids in results] == texts
    preprocessor.close()


async def test_a_template_s_refusal_comes_through():
    template = ChatTemplate("{{ raise_exception('not like this') }}", source="test")
    preprocessor = Preprocessor(ByteTokenizer(), template)
    for content in ("short", "long" * 1000):
        with pytest.raises(InvalidParameterError, match="not like this"):
            await preprocessor.chat([{"role": "user", "content": content}])
    preprocessor.close()


async def test_no_template_no_chat():
    with pytest.raises(InvalidParameterError, match="no chat template"):
        await Preprocessor(ByteTokenizer()).chat([{"role": "user", "content": "Hi"}])


async def test_the_time_limit_holds_and_others_are_not_delayed_by_what_hangs():
    gate = threading.Event()
    tokenizer = RecordingTokenizer(gate)
    preprocessor = Preprocessor(tokenizer, timeout_s=0.01, num_threads=1)
    try:
        with pytest.raises(InvalidParameterError, match=r"prompt took longer.*0\.01 s"):
            await preprocessor.encode("x" * 1000)
        tokenizer.gate = None
        preprocessor = Preprocessor(tokenizer, timeout_s=60, num_threads=1)
        assert len(await preprocessor.encode("x" * 1000)) == 1001
    finally:
        gate.set()
        preprocessor.close()
