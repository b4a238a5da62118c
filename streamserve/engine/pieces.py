"""What each token adds to a text, for the two kinds of decoder that nearly every model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class PieceTable(dict[int, "str | bytes"]):
    """Token id → what it adds: ``str`` for whole characters, ``bytes`` for what may be a part.

    Filled as ids are met, so that start-up does not pay for a vocabulary of 250,000.

    ``per_byte``: an incomplete character becomes one U+FFFD for each of its bytes
    (``ByteFallback``), not one in all (``ByteLevel``). ``strip_left``: up to this many spaces are
    taken off the front of the whole text (Llama's ``Strip``).
    """

    def __init__(
        self, to_bytes: Callable[[int], bytes], *, per_byte: bool = False, strip_left: int = 0
    ) -> None:
        super().__init__()
        self._to_bytes = to_bytes
        self.per_byte = per_byte
        self.strip_left = strip_left

    def __missing__(self, token_id: int) -> str | bytes:
        data = self._to_bytes(token_id)
        piece: str | bytes
        try:
            piece = data.decode()
        except UnicodeDecodeError:
            piece = data
        self[token_id] = piece
        return piece


class ByteDecoder(NamedTuple):
    """How a ``tokenizer.json``'s decoder turns one token into bytes; the rest as in PieceTable."""

    token_to_bytes: Callable[[str], bytes]
    per_byte: bool
    strip_left: int


def byte_decoder_of(decoder: Mapping[str, Any] | None) -> ByteDecoder | None:
    """Read a ``tokenizer.json``'s ``decoder``.

    ``None`` unless it is ``ByteLevel``, or SentencePiece's ``Replace ▁, ByteFallback, Fuse`` with
    or without a ``Strip`` on the left. Strict: with an unknown detail the general way is right.
    """
    if decoder is None:
        return None
    steps: list[Mapping[str, Any]] = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteDecoder(_byte_level_bytes, per_byte=False, strip_left=0)
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    if steps[0]["pattern"] != {"String": "▁"} or steps[0]["content"] != " ":
        return None
    strip_left = 0
    if kinds[3:]:
        if steps[3]["content"] != " " or steps[3]["stop"] != 0:
            return None
        strip_left = steps[3]["start"]
    return ByteDecoder(_byte_fallback_bytes, per_byte=True, strip_left=strip_left)


def _byte_level_table() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(c): c for c in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_table()
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()  # an added token, written as it is


def _byte_fallback_bytes(token: str) -> bytes:
    # tokenizers puts the space before it looks for a byte, so a "▁" cannot be part of one.
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        digits = token[3:5]
        if _HEX_DIGITS.issuperset(digits):
            return bytes([int(digits, 16)])
    return token.replace("▁", " ").encode()
