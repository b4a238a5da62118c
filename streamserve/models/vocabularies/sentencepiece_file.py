"""SentencePiece's ``tokenizer.model``: what of it makes a tokenizer.

The file is one protocol buffer (`sentencepiece_model.proto` of
https://github.com/google/sentencepiece) of few fields, which are read here without either library:
neither is needed for anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from streamserve.errors import ModelLoadError

# Numbers of fields, message by message.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5
_BPE = 2


class PieceType(IntEnum):
    """SentencePiece's, and ggml's after it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True)
class SentencePieceFile:
    """A BPE model: pieces by id, and what is done to a text first.

    ``charsmap`` is a compiled map of characters, empty where texts stay as they are.
    """

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


class NotBuiltError(Exception):
    """A kind of model that is not read here."""


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Raises ModelLoadError for a file that is damaged, NotBuiltError for one of another kind."""
    try:
        return _parse(path.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        raise ModelLoadError(f"{path} is no SentencePiece model: {error}") from error


def _parse(data: bytes) -> SentencePieceFile:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(_bytes(value)))
        elif number == _TRAINER:
            trainer = dict(_fields(_bytes(value)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    if trainer.get(_MODEL_TYPE, 1) != _BPE:
        raise NotBuiltError("it is not of the BPE kind")
    if trainer.get(_WHITESPACE_AS_SUFFIX) or not normalizer.get(_ESCAPE, 1):
        raise NotBuiltError("its pieces do not begin with their spaces")
    if any(piece.type is PieceType.UNUSED for piece in pieces):
        raise NotBuiltError("it has pieces that are switched off")
    return SentencePieceFile(
        pieces=tuple(pieces),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        charsmap=_bytes(normalizer.get(_CHARSMAP, b"")),
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(normalizer.get(_REMOVE_EXTRA, 1)),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    [score] = struct.unpack("<f", _bytes(fields.get(_SCORE, bytes(4))))
    text = _bytes(fields[_PIECE]).decode()
    kind = fields.get(_TYPE, PieceType.NORMAL)
    return Piece(text, score, PieceType(kind if isinstance(kind, int) else 0))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError("a number stands where bytes should")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message: numbers of variable length, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(data):
            raise ValueError("it ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
