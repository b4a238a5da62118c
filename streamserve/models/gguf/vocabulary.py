"""A tokenizer out of a GGUF file's metadata, as a ``tokenizer.json`` and its config.

Three kinds: ``gpt2``, byte-level pieces with a table of merges; ``llama``, SentencePiece's, whose
pieces have scores: of the neighbours that make a piece, those that make the best one are merged;
and ``gemma4``, pieces like these with a table like those.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from streamserve.config import TextFiles
from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.gguf.container import open_gguf
from streamserve.models.gguf.metadata import Metadata
from streamserve.models.gguf.pre_tokenizers import known_splittings, splitting
from streamserve.models.gguf.special_tokens import special_token_id
from streamserve.models.vocabularies.sentencepiece_file import PieceType

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NAMED_TOKENS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
    "mask": "mask_token",
}
_SPACE = "▁"
# A piece's splits are looked for in all of its places; none of a real vocabulary is this long.
_LONGEST_MERGED = 256


def read_text_files(path: Path) -> TextFiles:
    """Raises ModelLoadError or UnsupportedModelError, which name the file and the key."""
    metadata = open_gguf(path).metadata
    vocabulary = _Vocabulary(metadata)
    kind = metadata.text(_PREFIX + "model")
    if kind == "gpt2":
        tokenizer, model = _byte_level(metadata, vocabulary)
    elif kind in ("llama", "gemma4"):
        merges = _table(metadata, vocabulary) if kind == "gemma4" else None
        tokenizer, model = _sentence_piece(metadata, vocabulary, merges)
    else:
        raise UnsupportedModelError(
            f"{metadata.path}: {_PREFIX}model {kind!r} is not supported; these are: gpt2, llama, "
            "gemma4"
        )
    config: dict[str, Any] = {
        name: vocabulary.tokens[token_id]
        for key, name in _NAMED_TOKENS.items()
        if (token_id := special_token_id(metadata, key)) is not None
        and token_id < len(vocabulary.tokens)
    }
    template = _chat_template(metadata)
    if template is not None:
        config["chat_template"] = template
    return TextFiles(
        source=str(metadata.path),
        tokenizer=_tokenizer_json(tokenizer, model, vocabulary),
        config=config,
        model_type=metadata.optional_text("general.architecture"),
    )


class _Vocabulary:
    """The pieces by id. Rows that only pad the embedding have none."""

    def __init__(self, metadata: Metadata) -> None:
        key = _PREFIX + "tokens"
        self.tokens = metadata.texts(key)
        if not self.tokens:
            raise ModelLoadError(f"{metadata.path} lacks {key}: it holds no tokenizer")
        self.types = metadata.numbers(_PREFIX + "token_type")
        if not self.types:
            self.types = [PieceType.NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise ModelLoadError(
                f"{metadata.path}: {_PREFIX}token_type has {len(self.types)} entries for "
                f"{len(self.tokens)} tokens"
            )
        self.ids = {token: index for index, token in self._held()}
        if len(self.ids) < sum(1 for _ in self._held()):
            raise ModelLoadError(f"{metadata.path}: {key} names a token twice")

    def _held(self) -> Iterator[tuple[int, str]]:
        for index, token in enumerate(self.tokens):
            if self.types[index] != PieceType.UNUSED or token != f"[PAD{index}]":
                yield index, token

    def of_type(self, *types: PieceType) -> Iterator[tuple[int, str]]:
        return ((i, token) for i, token in self._held() if self.types[i] in types)

    def added(self) -> list[dict[str, Any]]:
        """What is taken out of a text as it stands, before it is cut."""
        kinds = {PieceType.CONTROL: True, PieceType.USER_DEFINED: False}
        how = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": index, "content": token, "special": kinds[self.types[index]], **how}
            for index, token in self._held()
            if self.types[index] in kinds
        ]


def _tokenizer_json(tokenizer: Tokenizer, model: dict[str, Any], vocabulary: _Vocabulary) -> str:
    """``tokenizer`` is all but the model, whose tables it would take seconds to build and write."""
    content = orjson.loads(tokenizer.to_str())
    content["model"].update(model, vocab=vocabulary.ids)
    content["added_tokens"] = vocabulary.added()
    return orjson.dumps(content).decode()


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary) -> tuple[Tokenizer, dict[str, Any]]:
    pre = metadata.optional_text(_PREFIX + "pre")
    cut = splitting(pre)
    if cut is None:
        raise UnsupportedModelError(
            f"{metadata.path}: {_PREFIX}pre {pre!r} is not supported; "
            f"these are: {', '.join(known_splittings())}"
        )
    unknown = special_token_id(metadata, "unknown")
    model = {
        "merges": _table(metadata, vocabulary),
        "ignore_merges": cut.whole_pieces,
        "unk_token": None if unknown is None else vocabulary.tokens[unknown],
    }
    tokenizer = Tokenizer(models.BPE())
    if cut.composed:
        tokenizer.normalizer = cut.normalizer()
    tokenizer.pre_tokenizer = cut.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    _put_around(tokenizer, metadata, vocabulary, bos=cut.bos, eos=False)
    return tokenizer, model


def _table(metadata: Metadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    return [_pair(vocabulary, metadata, merge) for merge in metadata.texts(_PREFIX + "merges")]


def _pair(vocabulary: _Vocabulary, metadata: Metadata, merge: str) -> tuple[str, str]:
    # A piece may begin with a space where it is not the byte-level one.
    at = merge.find(" ", 1)
    left, right = merge[:at], merge[at + 1 :]
    if at < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
        raise ModelLoadError(
            f"{metadata.path}: {_PREFIX}merges: {merge!r} is no pair of tokens that make another"
        )
    return left, right


def _sentence_piece(
    metadata: Metadata, vocabulary: _Vocabulary, merges: list[tuple[str, str]] | None
) -> tuple[Tokenizer, dict[str, Any]]:
    """Without ``merges`` they are found by the pieces' scores."""
    unknown = next((token for _, token in vocabulary.of_type(PieceType.UNKNOWN)), None)
    has_bytes = next(vocabulary.of_type(PieceType.BYTE), None) is not None
    model = {
        "merges": _merges(metadata, vocabulary) if merges is None else merges,
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": has_bytes,
    }
    tokenizer = Tokenizer(models.BPE())
    stated = metadata.optional_flag(_PREFIX + "add_space_prefix")
    prefixed = merges is None if stated is None else stated
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if prefixed:
        steps.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    after: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefixed:
        after.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(after)
    _put_around(tokenizer, metadata, vocabulary, bos=True, eos=False)
    return tokenizer, model


def _merges(metadata: Metadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the pairs of the best one first."""
    scores = metadata.numbers(_PREFIX + "scores")
    if len(scores) != len(vocabulary.tokens):
        raise ModelLoadError(
            f"{metadata.path}: {_PREFIX}scores has {len(scores)} entries for "
            f"{len(vocabulary.tokens)} tokens"
        )
    ids = {token: index for index, token in vocabulary.of_type(PieceType.NORMAL)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in ids.items():
        if len(token) > _LONGEST_MERGED:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _put_around(
    tokenizer: Tokenizer, metadata: Metadata, vocabulary: _Vocabulary, *, bos: bool, eos: bool
) -> None:
    """The tokens that stand before and after every text; ``bos`` and ``eos`` where none says."""
    parts = []
    for name, by_default in (("bos", bos), ("eos", eos)):
        stated = metadata.optional_flag(f"{_PREFIX}add_{name}_token")
        token_id = special_token_id(metadata, name)
        if (by_default if stated is None else stated) and token_id is not None:
            parts.append((name, vocabulary.tokens[token_id], token_id))
    if parts:
        before = [token for name, token, _ in parts if name == "bos"]
        after = [token for name, token, _ in parts if name == "eos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", "$B:1", *after],
            special_tokens=[(token, token_id) for _, token, token_id in parts],
        )


def _chat_template(metadata: Metadata) -> str | list[dict[str, str]] | None:
    """One template, or several by name."""
    template = metadata.optional_text(_TEMPLATE)
    named = [
        {"name": key.removeprefix(_TEMPLATE + "."), "template": metadata.text(key)}
        for key in metadata.keys_under(_TEMPLATE + ".")
    ]
    if not named or template is None:
        return template or None
    return [{"name": "default", "template": template}, *named]
