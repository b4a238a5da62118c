"""Text to token ids and back, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from streamserve.engine.pieces import PieceTable, byte_decoder_of
from streamserve.engine.token_memo import MIN_CHARACTERS, TokenMemo, safe_cut_tokens
from streamserve.errors import EngineError, InvalidParameterError, ModelLoadError

_NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. ``encode`` may be called from several threads."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""

    @property
    def all_special_ids(self) -> frozenset[int]:
        """The ids that ``skip_special_tokens`` leaves out."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """``bos_token`` and the like, by their text: chat templates see them."""

    @property
    def decodes_in_order(self) -> bool:
        """Whether a token adds to a text and leaves what was there, but for half a character."""

    def encode(self, text: str, *, add_special_tokens: bool, salt: str | None = None) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become their ids.

        With a ``salt`` long texts may be remembered, for texts with the same one.
        """

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; incomplete characters become U+FFFD, unknown ids nothing."""

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text, as logprobs report it; U+FFFD for part of a character."""

    def token_bytes(self, token_id: int) -> bytes:
        """The same as bytes, parts of characters included."""

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary writes it ("Ġhello"); empty if there is none."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, ``None`` if the vocabulary lacks it."""

    def is_special(self, token_id: int) -> bool:
        """Whether ``skip_special_tokens`` leaves the token out."""

    def pieces(self, *, skip_special_tokens: bool) -> PieceTable | None:
        """The fast way to decode token by token, ``None`` if this tokenizer has none."""


class FastTokenizer:
    """A ``tokenizer.json``, as ``tokenizers`` reads it, and the names of its special tokens.

    What ``add_special_tokens`` adds is the file's own affair: ``add_bos_token`` and the like in
    ``tokenizer_config.json`` have no effect, as in transformers 5.

    ``special_tokens`` maps ``bos_token`` and the like to their text: chat templates see them.
    ``config`` is ``tokenizer_config.json``.
    """

    decodes_in_order = True

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.config: Mapping[str, Any] = config or {}
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        # The config may call a token special that tokenizer.json holds as an ordinary one.
        entries = (self.config.get("added_tokens_decoder") or {}).values()
        special = [entry["content"] for entry in entries if entry.get("special")]
        special.extend(self.special_tokens.values())
        known = [token for token in special if backend.token_to_id(token) is not None]
        if known:
            backend.add_special_tokens(known)
        added = backend.get_added_tokens_decoder()
        self._all_special_ids = frozenset(i for i, token in added.items() if token.special)
        cut_tokens = safe_cut_tokens(added.values())
        self._memo = TokenMemo(self._encode_plain, cut_tokens) if cut_tokens else None
        self._vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._byte_decoder = byte_decoder_of(json.loads(backend.to_str()).get("decoder"))
        self._pieces = {skip: self._piece_table(skip) for skip in (False, True)}

    @classmethod
    def from_directory(
        cls, path: str | Path, *, backend: tokenizers.Tokenizer | None = None
    ) -> FastTokenizer:
        """Read a checkpoint's tokenizer. Raises ``ModelLoadError`` naming the file at fault.

        ``backend`` was made of other files, where there is no ``tokenizer.json``.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if backend is not None:
            found = backend
        elif file.is_file():
            try:
                found = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises bare Exception
                raise ModelLoadError(f"{file} cannot be read: {error}") from error
        else:
            raise ModelLoadError(f"{directory} holds no tokenizer.json")
        config = read_json(directory / "tokenizer_config.json")
        special_map = read_json(directory / "special_tokens_map.json")
        special_tokens = {**_named_special_tokens(special_map), **_named_special_tokens(config)}
        return cls(found, special_tokens=special_tokens, config=config)

    @classmethod
    def from_config(cls, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> FastTokenizer:
        """A tokenizer that was made, and what its ``tokenizer_config.json`` would hold."""
        return cls(backend, special_tokens=_named_special_tokens(config), config=config)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def all_special_ids(self) -> frozenset[int]:
        return self._all_special_ids

    def encode(self, text: str, *, add_special_tokens: bool, salt: str | None = None) -> list[int]:
        if add_special_tokens:
            return self._encode(text, add_special_tokens=True)
        if self._memo is None or salt is None or len(text) < MIN_CHARACTERS:
            return self._encode_plain(text)
        return self._memo.encode(text, salt)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        try:
            # ``decode`` holds the interpreter lock, this does not.
            [text] = self._backend.decode_batch(
                [list(ids)], skip_special_tokens=skip_special_tokens
            )
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise EngineError("the tokenizer cannot decode these tokens") from error
        return text

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_decoder is not None:
            return self._byte_decoder.token_to_bytes(token)
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    def id_to_token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._all_special_ids

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, ``None`` if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def pieces(self, *, skip_special_tokens: bool) -> PieceTable | None:
        return self._pieces[skip_special_tokens]

    def _encode_plain(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # ``encode`` holds the interpreter lock, this does not: a long text must not stop the loop.
        try:
            [encoding] = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except BaseException as error:
            if isinstance(error, TypeError) and _has_half_characters(text):
                raise InvalidParameterError(
                    "the text holds half of a surrogate pair, which is no character",
                    code="invalid_value",
                ) from None
            if not _is_panic(error):
                raise
            raise InvalidParameterError(
                "the tokenizer cannot encode this text", code="tokenizer_failed"
            ) from error
        return encoding.ids

    def _piece_table(self, skip_special_tokens: bool) -> PieceTable | None:
        decoder = self._byte_decoder
        if decoder is None:
            return None
        token_to_bytes, id_to_token = decoder.token_to_bytes, self._backend.id_to_token
        skipped_ids = self._all_special_ids if skip_special_tokens else frozenset()

        def to_bytes(token_id: int) -> bytes:
            # Rows that pad the model's vocabulary have no token: tokenizers' decode drops them too.
            token = None if token_id in skipped_ids else id_to_token(token_id)
            return b"" if token is None else token_to_bytes(token)

        return PieceTable(to_bytes, per_byte=decoder.per_byte, strip_left=decoder.strip_left)


def _is_panic(error: BaseException) -> bool:
    """Whether a bug in the library was met: it is no Exception, and would end whoever calls."""
    return type(error).__name__ == "PanicException"


def _has_half_characters(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``, empty if there is no file. Raises ``ModelLoadError`` naming it."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in _NAMED_SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
    return named
