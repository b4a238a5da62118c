"""Token ids to text as they come: never half a character, and none lost at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.pieces import PieceTable
from streamserve.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4
_MAX_HELD = 32
"""Tokens held back at most by the general way: a character spans four, the rest is U+FFFD."""
_CONTEXT = 16
_MAX_CONTEXT = 1024
"""Tokens that a decoder which looks back is given, and at most, where they have no text."""


class IncrementalDetokenizer:
    """Decodes what follows a prompt. Not shared between requests; any one thread.

    What ``add`` and then ``finish`` return, put together, is what ``tokenizer.decode`` of prompt
    and output has after the prompt's own (complete) text, however the ids are cut into calls.
    One exception: ``ByteFallback`` turns *all* of a run of byte tokens into U+FFFD when the run is
    not valid UTF-8 as a whole. Characters of such a run that were complete have been shown by
    then, and stay; only the bytes that belong to none become U+FFFD.
    """

    __slots__ = ("add", "finish")

    add: Callable[[Sequence[int]], str]
    """Take the next ids and return the text that has become certain."""
    finish: Callable[[], str]
    """Return what was held back: a character that stays incomplete, as ``decode`` gives it."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        skip = params.skip_special_tokens
        pieces = tokenizer.pieces(skip_special_tokens=skip)
        way: _PieceDetokenizer | _WindowDetokenizer | _LaggingDetokenizer
        if pieces is not None:
            way = _PieceDetokenizer(pieces, prompt_token_ids)
        elif not tokenizer.decodes_in_order:
            way = _LaggingDetokenizer(tokenizer, prompt_token_ids, skip)
        else:
            joins = not (skip or params.spaces_between_special_tokens)
            way = _WindowDetokenizer(tokenizer, prompt_token_ids, skip, joins_specials=joins)
        self.add = way.add
        self.finish = way.finish


class _PieceDetokenizer:
    """Every token's text is in a table; bytes of a character wait until it is complete."""

    __slots__ = ("_num_to_strip", "_pending", "_pieces")

    def __init__(self, pieces: PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._pending = b""
        self._num_to_strip = pieces.strip_left
        if self._num_to_strip and any(pieces[token_id] for token_id in reversed(prompt_token_ids)):
            self._num_to_strip = 0
        # The prompt may end inside a character, which then is the output's.
        tail: list[bytes] = []
        for token_id in reversed(prompt_token_ids):
            piece = pieces[token_id]
            if isinstance(piece, bytes) and len(tail) < _MAX_CHARACTER_BYTES:
                tail.append(piece)
            elif piece:
                break
        self._add_bytes(b"".join(reversed(tail)))

    def add(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        if len(token_ids) == 1 and not self._pending:
            piece = pieces[token_ids[0]]
            if piece.__class__ is str and not self._num_to_strip:
                return piece
        texts = []
        for token_id in token_ids:
            piece = pieces[token_id]
            if isinstance(piece, bytes):
                texts.append(self._add_bytes(piece))
            elif piece:
                if self._pending:
                    texts.append(self._flush())
                texts.append(piece)
        return self._strip("".join(texts))

    def finish(self) -> str:
        return self._flush()

    def _add_bytes(self, piece: bytes) -> str:
        """Take the whole characters out of ``pending + piece``; keep the beginning of one."""
        data = self._pending + piece
        text = ""
        while True:
            try:
                text += data.decode()
            except UnicodeDecodeError as error:
                text += data[: error.start].decode()
                if error.reason == "unexpected end of data":
                    self._pending = data[error.start :]
                    return text
                text += _REPLACEMENT * (error.end - error.start if self._pieces.per_byte else 1)
                data = data[error.end :]
            else:
                self._pending = b""
                return text

    def _flush(self) -> str:
        num_bytes = len(self._pending)
        self._pending = b""
        return _REPLACEMENT * (num_bytes if self._pieces.per_byte else min(num_bytes, 1))

    def _strip(self, text: str) -> str:
        while self._num_to_strip and text:
            if text[0] == " ":
                self._num_to_strip -= 1
                text = text[1:]
            else:
                self._num_to_strip = 0
        return text


class _WindowDetokenizer:
    """For any decoder: the text of a token is what it adds to that of the tokens before it.

    ::

        _ids    context, all shown | since then: shown up to an incomplete character
                0                  ^ _num_context
        text of _ids               |<- _num_shown characters ->| held back: U+FFFD
    """

    __slots__ = (
        "_follows_special",
        "_ids",
        "_joins_specials",
        "_num_context",
        "_num_shown",
        "_skip",
        "_tokenizer",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip: bool,
        *,
        joins_specials: bool = False,
    ) -> None:
        """With ``joins_specials`` no space comes between two special tokens."""
        self._tokenizer = tokenizer
        self._joins_specials = joins_specials
        self._follows_special = False
        self._skip = skip
        # The shortest end of the prompt that has text and does not begin inside a character.
        size = 4
        while True:
            self._ids = list(prompt_token_ids[-size:])
            text = self._decode()
            if size >= len(prompt_token_ids) or (text and text[0] != _REPLACEMENT):
                break
            size *= 2
        self._num_context = len(self._ids)
        self._num_shown = len(text.rstrip(_REPLACEMENT))

    def add(self, token_ids: Sequence[int]) -> str:
        if self._joins_specials:
            return "".join([self._add_joined(token_id) for token_id in token_ids])
        return "".join([self._add_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._decode()[self._num_shown :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)

    def _add_joined(self, token_id: int) -> str:
        text = self._add_one(token_id)
        follows_special = self._follows_special
        self._follows_special = self._tokenizer.is_special(token_id)
        if self._follows_special and follows_special:
            return self._tokenizer.token_text(token_id)
        return text

    def _add_one(self, token_id: int) -> str:
        before = self._num_shown
        self._ids.append(token_id)
        text = self._decode()
        num_new_ids = len(self._ids) - self._num_context
        if len(text) <= before:
            if num_new_ids == 1:
                self._ids.pop()  # a token without text, such as a skipped one
            return ""
        if text[-1] == _REPLACEMENT and num_new_ids < _MAX_HELD:
            self._num_shown = max(before, len(text.rstrip(_REPLACEMENT)))
            return text[before : self._num_shown]
        # The next context is what has come since this one. It has text, so whatever the decoder
        # does at the beginning of a text happens alike with and without the next token.
        del self._ids[: self._num_context]
        self._num_context = num_new_ids
        self._num_shown = len(self._decode())
        return text[before:]


class _LaggingDetokenizer:
    """For decoders that may change the end of a text when it goes on: ``ab@@`` to ``abc``.

    Shown is what the next token has left alone, so that a text comes one token late::

        text of _ids   shown | the last token's, and half a character
    """

    __slots__ = ("_ids", "_num_held", "_num_shown", "_skip", "_text", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._ids = list(prompt_token_ids[-_CONTEXT:])
        self._text = self._decode(self._ids)
        self._num_held = 0
        # The prompt's end, too, may be changed by what comes.
        self._num_shown: int | None = None

    def add(self, token_ids: Sequence[int]) -> str:
        return "".join([self._add_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return "" if self._num_shown is None else self._text[self._num_shown :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _add_one(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        if (self._skip and tokenizer.is_special(token_id)) or not tokenizer.id_to_token(token_id):
            return ""
        before = self._text
        self._ids.append(token_id)
        self._text = text = self._decode(self._ids)
        self._num_held += 1
        certain = _num_common(before, text)
        if self._num_held < _MAX_HELD:
            certain = min(certain, len(text.rstrip(_REPLACEMENT)))
        shown = self._num_shown
        if shown is None:
            shown = certain
        elif certain < shown and (start := text.find(before)) > 0:
            # A space was put before all of it.
            shown, certain = shown + start, len(before) + start
        self._num_shown = max(shown, certain)
        if certain > shown:
            self._num_held = 0
        self._forget()
        return text[shown:certain]

    def _forget(self) -> None:
        """Old tokens go, once the others have text enough for what a decoder does at its front."""
        if len(self._ids) < 2 * _CONTEXT:
            return
        assert self._num_shown is not None  # a token was added
        held = self._text[self._num_shown :]
        text = self._decode(self._ids[-_CONTEXT:])
        has_context = text.endswith(held) and len(text) > len(held)
        if has_context or len(self._ids) >= _MAX_CONTEXT:
            del self._ids[:-_CONTEXT]
            self._text, self._num_shown = text, max(0, len(text) - len(held))


def _num_common(first: str, second: str) -> int:
    """How many characters both begin with."""
    if second.startswith(first):
        return len(first)
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(second))
