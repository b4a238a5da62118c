"""Vocabularies that are no ``tokenizer.json``, read without the code that came with them.

What a repository's own ``tokenization_*.py`` would do is here a row of data for each class that it
defines: which special tokens follow the vocabulary, and which go before a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from streamserve.errors import ModelLoadError
from streamserve.models.vocabularies.sentencepiece import (
    add_prefix,
    add_special,
    sentencepiece_tokenizer,
)
from streamserve.models.vocabularies.sentencepiece_file import NotBuiltError, read_sentencepiece
from streamserve.models.vocabularies.tiktoken import is_ranks, read_ranks, tiktoken_tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_PATTERN = _CONTRACTIONS + r"\p{N}" + _OTHERS
_GLM4_PATTERN = _CONTRACTIONS + r"\p{N}{1,3}" + _OTHERS
_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM4_SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *_ROLES,
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)


@dataclass(frozen=True, slots=True)
class _SentencePieceClass:
    """``special`` tokens follow the vocabulary; ``prefix`` goes before a text, else perhaps bos."""

    special: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()


_SENTENCEPIECE_CLASSES = {
    "ChatGLMTokenizer": _SentencePieceClass(
        ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"), ("[gMASK]", "sop")
    ),
    "BaichuanTokenizer": _SentencePieceClass(),
    "BaiChuanTokenizer": _SentencePieceClass(),
    "LlamaTokenizer": _SentencePieceClass(),
    "LlamaTokenizerFast": _SentencePieceClass(),
}


def own_tokenizer(directory: Path, config: dict[str, Any]) -> Tokenizer | None:
    """The directory's tokenizer, if its files are of a kind that is read here.

    ``config`` is ``tokenizer_config.json``. Raises ModelLoadError for a damaged file.
    """
    qwen = directory / "qwen.tiktoken"
    if qwen.is_file():
        return _ranked(qwen, _QWEN_PATTERN, _QWEN_SPECIAL, nfc=True)
    vocabulary, name = directory / "tokenizer.model", config.get("tokenizer_class")
    if not vocabulary.is_file():
        return None
    if is_ranks(vocabulary):
        if name != "ChatGLM4Tokenizer":
            return None
        tokenizer = _ranked(vocabulary, _GLM4_PATTERN, _GLM4_SPECIAL)
        add_prefix(tokenizer, ("[gMASK]", "<sop>"))
        return tokenizer
    known = _SENTENCEPIECE_CLASSES.get(str(name))
    if known is None:
        return None
    try:
        model = read_sentencepiece(vocabulary)
    except NotBuiltError:
        return None
    # Roles of a chat are among the pieces.
    reserved = [p.text for p in model.pieces if p.text.startswith("<reserved_")]
    roles = _ROLES if name == "ChatGLMTokenizer" and _has_roles(directory, config) else ()
    pieces = {piece.text for piece in model.pieces}
    for token in known.special:
        if token in pieces:  # a token has one id, and the model has learned another for this one
            raise ModelLoadError(
                f"{vocabulary} has a piece {token!r}, which is the name of a special token: a "
                "tokenizer.json is needed, which tells them apart"
            )
    tokenizer = sentencepiece_tokenizer(
        model, (*reserved, *known.special, *roles), prefix_once=config.get("legacy") is False
    )
    prefix = known.prefix
    if not prefix and config.get("add_bos_token", True):
        prefix = (_text(config.get("bos_token", "<s>")),)
    if prefix:
        add_prefix(tokenizer, prefix)
    return tokenizer


def _ranked(
    vocabulary: Path, pattern: str, special: tuple[str, ...], *, nfc: bool = False
) -> Tokenizer:
    tokenizer = tiktoken_tokenizer(read_ranks(vocabulary), pattern, nfc=nfc)
    add_special(tokenizer, special)
    return tokenizer


def _has_roles(directory: Path, config: dict[str, Any]) -> bool:
    """Whether this is the third ChatGLM: of the second, names and code (which is read) tell."""
    if any(role in str(config.get("added_tokens_decoder")) for role in _ROLES):
        return True
    code = directory / "tokenization_chatglm.py"
    if code.is_file():
        return _ROLES[0] in code.read_text(encoding="utf-8", errors="replace")
    names = f"{config.get('name_or_path')} {directory.resolve()}"
    return "glm2" not in names.lower()


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
