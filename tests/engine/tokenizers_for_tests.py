"""Small tokenizers of every kind, built in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from streamserve.engine.tokenizer import FastTokenizer

TEXTS = [
    "Hello there, how are you today? I am fine, thank you very much.",
    "Ünïcödé wörds, naïve café, Straße. 你好，世界！日本語のテキスト。 Привет, мир!",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 👍🏽 mixed  with   spaces\n\n\tand tabs; e\u0301 combining",
    "def f(x):\n    return x ** 2  # code\n",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
ADDED = [AddedToken("<tool call>", special=False), AddedToken("｜工具｜", special=False)]


class RecordedDecodes:
    """A tokenizer that remembers in ``sizes`` how many ids each decode was of."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.sizes.append(len(ids))
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def _with_added(backend: Tokenizer) -> FastTokenizer:
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(ADDED)
    return FastTokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def byte_level() -> FastTokenizer:
    """GPT-2, Llama 3, Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _with_added(backend)


def _sentencepiece(*tail: decoders.Decoder) -> FastTokenizer:
    vocab = {"<unk>": 0}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in [
        "▁",
        "▁▁",
        "h",
        "e",
        "l",
        "o",
        "▁h",
        "▁o",
        "he",
        "lo",
        "你",
        "▁é",
        "ñ",
        "👍",
        "\ufffd",
    ]:
        vocab[piece] = len(vocab)
    merges = [("▁", "▁"), ("▁", "h"), ("▁", "o"), ("h", "e"), ("l", "o")]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    backend.decoder = decoders.Sequence(steps)
    return _with_added(backend)


def llama() -> FastTokenizer:
    """Llama 1 and 2, Mistral: byte fallback, and a space off the front."""
    return _sentencepiece(decoders.Strip(" ", 1, 0))


def gemma() -> FastTokenizer:
    """Byte fallback, the front as it is."""
    return _sentencepiece()


def _word_vocab(prefix: str, suffix: str, inner: str) -> dict[str, int]:
    words = ["hello", "the", "world", "do", "n't", ".", ",", "un", "able", "é", "\ufffd", "[UNK]"]
    vocab: dict[str, int] = {}
    for word in words:
        vocab[prefix + word + suffix] = len(vocab)
        vocab[inner + word] = len(vocab)
    vocab.setdefault("[UNK]", len(vocab))
    return vocab


def word_piece() -> FastTokenizer:
    backend = Tokenizer(models.WordPiece(_word_vocab("", "", "##"), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return _with_added(backend)


def metaspace() -> FastTokenizer:
    backend = Tokenizer(models.WordLevel(_word_vocab("▁", "", ""), unk_token="[UNK]"))
    backend.decoder = decoders.Metaspace()
    return _with_added(backend)


def bpe_suffix() -> FastTokenizer:
    backend = Tokenizer(models.WordLevel(_word_vocab("", "</w>", ""), unk_token="[UNK]"))
    backend.decoder = decoders.BPEDecoder()
    return _with_added(backend)


def no_decoder() -> FastTokenizer:
    return _with_added(Tokenizer(models.WordLevel(_word_vocab("", "", "##"), unk_token="[UNK]")))


def byte_level_general() -> FastTokenizer:
    """Byte-level under a decoder that the fast way does not know."""
    backend = Tokenizer.from_str(byte_level()._backend.to_str())
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return FastTokenizer(backend)


KINDS = {
    f.__name__: cache(f)
    for f in (
        byte_level,
        llama,
        gemma,
        word_piece,
        metaspace,
        bpe_suffix,
        no_decoder,
        byte_level_general,
    )
}
FAST_KINDS = ("byte_level", "llama", "gemma")
