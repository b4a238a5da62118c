"""A tokenizer that needs no file: one token per byte of UTF-8, then the special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from streamserve.engine.pieces import PieceTable

_NUM_BYTES = 256


class ByteTokenizer:
    """Ids 0 to 255 are bytes, the next ones ``special_tokens`` in their order.

    For runs without a checkpoint: with the ``NullRunner``, in tests and benchmarks. The first
    special token is put before a text by ``add_special_tokens`` if it is ``"<s>"``.
    """

    decodes_in_order = True

    def __init__(self, special_tokens: Sequence[str] = ("<s>", "</s>")) -> None:
        self._special = {token: _NUM_BYTES + n for n, token in enumerate(special_tokens)}
        self._names = {token_id: token for token, token_id in self._special.items()}
        self._split = re.compile(f"({'|'.join(map(re.escape, special_tokens))})")
        self._prefix = [self._special["<s>"]] if "<s>" in self._special else []
        self._pieces = {
            True: PieceTable(lambda i: bytes([i]) if i < _NUM_BYTES else b""),
            False: PieceTable(self.token_bytes),
        }

    @property
    def vocab_size(self) -> int:
        return _NUM_BYTES + len(self._special)

    @property
    def all_special_ids(self) -> frozenset[int]:
        return frozenset(self._names)

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token``, as far as there are any: for chat templates."""
        named = {"bos_token": "<s>", "eos_token": "</s>"}
        return {name: token for name, token in named.items() if token in self._special}

    def encode(self, text: str, *, add_special_tokens: bool, salt: str | None = None) -> list[int]:
        ids = list(self._prefix) if add_special_tokens else []
        for part in self._split.split(text) if self._special else [text]:
            if part in self._special:
                ids.append(self._special[part])
            else:
                ids.extend(part.encode())
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        data = b"".join(
            self.token_bytes(i) for i in ids if not (skip_special_tokens and self.is_special(i))
        )
        return data.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < _NUM_BYTES:
            return bytes([token_id])
        return self._names.get(token_id, "").encode()

    def id_to_token(self, token_id: int) -> str:
        return self.token_text(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._names

    def token_to_id(self, token: str) -> int | None:
        """The id of a special token, or of a character that is one byte."""
        data = token.encode()
        return self._special.get(token, data[0] if len(data) == 1 else None)

    def pieces(self, *, skip_special_tokens: bool) -> PieceTable | None:
        return self._pieces[skip_special_tokens]
