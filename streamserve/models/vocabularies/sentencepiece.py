"""A SentencePiece BPE model as a `tokenizers` object."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from streamserve.models.vocabularies.sentencepiece_file import PieceType, SentencePieceFile

_SPACE = "▁"
_MERGED = (PieceType.NORMAL, PieceType.USER_DEFINED)


def sentencepiece_tokenizer(
    model: SentencePieceFile, special: Collection[str] = (), *, prefix_once: bool = False
) -> Tokenizer:
    """Ids are the pieces'. Control pieces are special tokens, and so are ``special``, new or not.

    What stands between two special tokens counts as a text of its own, so that its first word has
    the space that SentencePiece puts before it; with ``prefix_once`` only a text's first word has.
    """
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = [piece.text for piece in model.pieces if piece.type is PieceType.UNKNOWN]
    whole = [
        piece.text
        for piece in model.pieces
        if piece.type is PieceType.USER_DEFINED and piece.text not in special
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(model),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(model, whole, prefixes=not prefix_once)
    if prefix_once and model.add_dummy_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme="first", split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else [])
    )
    # Found in what a text is after the first word has got its space.
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in whole])
    control = [piece.text for piece in model.pieces if piece.type is PieceType.CONTROL]
    add_special(tokenizer, (*control, *special))
    return tokenizer


def add_special(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Special tokens by their text; those that are new get the next ids, in order.

    One that is a word is only found where it stands alone.
    """
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, single_word=text.isalnum()) for text in texts]
    )


def add_prefix(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Special tokens that go before a text."""
    ids: Mapping[str, int | None] = {text: tokenizer.token_to_id(text) for text in texts}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*texts, "$A"],
        special_tokens=[(text, number) for text, number in ids.items() if number is not None],
    )


def _merges(model: SentencePieceFile) -> list[tuple[str, str]]:
    """Every way to put a piece together of two, best pieces first."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.type in _MERGED}
    merges = [
        (-score, order, text[:cut], text[cut:])
        for order, (text, score) in enumerate(scores.items())
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def _normalizer(
    model: SentencePieceFile, whole: Sequence[str], *, prefixes: bool
) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefixes and model.add_dummy_prefix:
        # A piece of the user's is looked for as this leaves it: it must get no space itself.
        alone = f"(?!(?:{'|'.join(map(re.escape, whole))})\\z)" if whole else ""
        steps.append(normalizers.Replace(Regex(rf"\A{alone}(?=[\s\S])"), _SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)
