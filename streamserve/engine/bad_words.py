"""The spellings of words that must not appear: token ids as the sampler looks for them."""

from __future__ import annotations

from collections.abc import Iterable

from streamserve.engine.tokenizer import Tokenizer


def spell_bad_words(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins a text and as it follows a space.

    The second spelling counts, as in vLLM, only where the space is part of the word's own first
    token: a space that is a token by itself leaves the first one, which is looked for anywhere.
    """
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        first = tuple(tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(tokenizer.encode(f" {bare}", add_special_tokens=False))
        if first:
            spellings[first] = None
        if spaced and len(spaced) == len(first) and spaced[0] != first[0]:
            spellings[spaced] = None
    return tuple(spellings)
