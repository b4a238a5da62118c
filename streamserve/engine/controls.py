"""What a user types is text: ``<|im_end|>`` in a message must not end it.

Before a template runs, each special token in what users, tools and system prompts say becomes one
private character, which no template trims, cuts in two or looks for. In the rendered text the token
stands in its place again, encoded as text: in parts, none of which is the token. So does the
beginning of one at the end of a text, if the beginning of another text would complete it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from streamserve.engine.template_turns import Message
from streamserve.engine.tokenizer import Tokenizer

_TRUSTED = "assistant"  # the model's own words keep their markers: templates look for them
_PRIVATE = range(0xF0000, 0xFFFFE)
_MIN_CHARACTERS = 3  # a shorter one is found in anybody's text
_ANCHOR = "\n"
_NOTHING: tuple[set[str], set[str]] = (set(), set())

Hidden = Mapping[str, str]
"""Private characters, and the special token, or the beginning of one, that each stands for."""


class Controls:
    """A vocabulary's special tokens. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {tokenizer.id_to_token(i) for i in tokenizer.all_special_ids}
        names = {name for name in names if len(name) >= _MIN_CHARACTERS}
        # Hundreds of names begin in a few ways: nearly every text is known to hold none by these.
        self._beginnings = sorted({name[:2] for name in names})
        self._tokenizer = tokenizer
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        forms = [self._pattern_of(name) for name in longest_first]
        self._pattern = re.compile("|".join(forms)) if names else None
        # What a token begins with -> what it goes on with: all of the rest, and parts of it.
        self._rests: dict[str, tuple[set[str], set[str]]] = {}
        for name in longest_first:
            for size in range(1, len(name)):
                rests, parts = self._rests.setdefault(name[:size], (set(), set()))
                rests.add(name[size:])
                parts.update(name[size:end] for end in range(size + 1, len(name)))
        self._longest = max(map(len, names), default=0)
        self._first_characters = tuple({name[0] for name in names})

    def hide(self, messages: Sequence[Message]) -> tuple[Sequence[Message], Hidden]:
        """The same messages without special tokens, and what stands in their places."""
        if self._pattern is None or not any(map(self._may_hold, messages)):
            return messages, {}
        free = self._free_characters(messages)
        heads = {text.lstrip()[: self._longest] for m in messages for text in _strings(m)}
        begun = {head[:size] for head in heads for size in range(1, len(head) + 1)}
        characters: dict[str, str] = {}
        pattern = self._pattern

        def character(name: str) -> str:
            if name not in characters:
                characters[name] = next(free)
            return characters[name]

        def hidden(text: str) -> str:
            text = pattern.sub(lambda match: character(match[0]), text)
            body = text.rstrip()  # a template may trim it
            tail = self._open_end(body, heads, begun)
            return body.removesuffix(tail) + character(tail) + text[len(body) :] if tail else text

        found = [
            message
            if message.get("role") == _TRUSTED
            else {
                key: value if key == "role" else _replaced(value, hidden)
                for key, value in message.items()
            }
            for message in messages
        ]
        return found, {character: name for name, character in characters.items()}

    def encode(
        self, rendered: str, hidden: Hidden, *, add_special_tokens: bool
    ) -> tuple[str, list[int]]:
        """The text that ``rendered`` stands for, and its token ids."""
        characters = {form: name for char, name in hidden.items() for form in _forms(char)}
        pattern = re.compile("|".join(map(re.escape, characters)), re.IGNORECASE)
        texts: list[str] = []
        ids: list[int] = []
        end = 0
        for match in pattern.finditer(rendered):
            before = rendered[end : match.start()]
            ids += self._inner(before) if end else self._plain(before)
            name = characters[match[0].lower()]
            ids += self._as_text(name)
            texts += (before, name)
            end = match.end()
        ids += self._inner(rendered[end:]) if end else self._plain(rendered)
        texts.append(rendered[end:])
        return "".join(texts), self._wrapped(ids) if add_special_tokens else ids

    def _pattern_of(self, name: str) -> str:
        """Where a special token is found; one that is a word ("sop") maybe not inside another."""
        pattern = re.escape(name)
        if name.isalnum():
            special = self._tokenizer.all_special_ids
            if special.isdisjoint(self._plain(f"a{name}a")):
                return rf"(?<!\w){pattern}(?!\w)"
        return pattern

    def _may_hold(self, message: Message) -> bool:
        return message.get("role") != _TRUSTED and any(
            text.rstrip().endswith(self._first_characters)
            or any(start in text for start in self._beginnings)
            for text in _strings(message)
        )

    def _open_end(self, text: str, heads: set[str], begun: set[str]) -> str:
        """The beginning of a special token that ``text`` ends with and one of ``heads`` goes on.

        ``begun`` is what these begin with.
        """
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            rests, parts = self._rests.get(text[-size:], _NOTHING)
            if not (rests.isdisjoint(begun) and parts.isdisjoint(heads)):
                return text[-size:]
        return ""

    def _free_characters(self, messages: Sequence[Message]) -> Iterator[str]:
        """Private characters that nobody has written; there are 65,534 to write, and limits."""
        taken = {
            c for message in messages for text in _strings(message) for c in text if c > "\ue000"
        }
        return (chr(code) for code in _PRIVATE if chr(code) not in taken)

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    @cached_property
    def _takes_for_words(self) -> bool:
        """Whether the beginning of any text is that of a word, as SentencePiece has it."""
        return self._tokenizer.decode([*self._plain("a"), *self._plain("b")]) != "ab"

    def _inner(self, text: str) -> list[int]:
        """Ids of a text that follows another."""
        if not text or not self._takes_for_words:
            return self._plain(text)
        anchor_ids = self._plain(_ANCHOR)
        ids = self._plain(_ANCHOR + text)
        return ids[len(anchor_ids) :] if ids[: len(anchor_ids)] == anchor_ids else self._plain(text)

    def _as_text(self, name: str) -> list[int]:
        """Ids of a special token's name, none of which is special."""
        assert self._pattern is not None
        if self._pattern.search(name) is None:
            return self._inner(name)
        return self._inner(name[0]) + self._as_text(name[1:])

    def _wrapped(self, ids: list[int]) -> list[int]:
        """With what the tokenizer puts around a text."""
        bare = self._plain("a")
        whole = self._tokenizer.encode("a", add_special_tokens=True)
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
        return whole[:start] + ids + whole[start + len(bare) :]


def _forms(character: str) -> tuple[str, str]:
    """A character as it is, and as JSON escapes it."""
    return character, json.dumps(character)[1:-1]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _replaced(value: Any, hidden: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, hidden) for item in value]
    return value
