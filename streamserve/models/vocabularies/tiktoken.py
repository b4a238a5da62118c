"""A file of ranks, as tiktoken reads them, as a byte-level BPE of `tokenizers`."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from streamserve.errors import ModelLoadError


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARACTERS = _byte_characters()


def read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of a token in base64 and its rank. Raises ModelLoadError that names the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelLoadError(f"{path}, line {number}: no token and rank: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelLoadError(f"{path}: the ranks of {len(ranks)} tokens are not 0, 1, 2, …")
    return ranks


def is_ranks(path: Path) -> bool:
    """Whether a file called ``tokenizer.model`` is one of these, by its first line."""
    with path.open("rb") as file:
        first = file.readline(1024).split()
    try:
        return (
            len(first) == 2
            and first[1].isdigit()
            and bool(base64.b64decode(first[0], validate=True))
        )
    except binascii.Error:
        return False


def tiktoken_tokenizer(ranks: dict[bytes, int], pattern: str, *, nfc: bool = False) -> Tokenizer:
    """``pattern`` cuts a text into words; ``nfc`` normalises it first."""
    names = {token: "".join([_CHARACTERS[byte] for byte in token]) for token in ranks}
    merges: list[tuple[int, str, str]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, names[left], names[right]))
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        models.BPE(
            {names[token]: rank for token, rank in ranks.items()},
            [(left, right) for _, left, right in merges],
            ignore_merges=True,
        )
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
