"""Tokenizers and templates out of GGUF files, against those that the files were made of."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from streamserve.engine.text_source import TextSource
from streamserve.engine.tokenizer import FastTokenizer
from streamserve.errors import ModelLoadError
from streamserve.models import read_text_files
from tests.models.vocabulary_cases import streamed

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234567 years old, isn't it?",
    "def f(x):\n    return x ** 2  # 99.5%\r\n\n\n\tclass A: pass\n",
    "Größe, naïve cafés, Ελλάδα και Россия — 日本語の文章、한국어 문장 😀👍🏽 مرحبا שלום",
    "We'LL SEE what THEY'RE doing; I'm sure you'd've known!!! ((a+b)*c)/d == e",
]
SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A piece that no merge leads to: only where pieces are taken whole it is ever found.
WHOLE = " zqxj"
# Letters, marks, digits, spaces and emoji of many scripts, and pieces of what a cut looks for.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.text(st.characters(categories=["L", "M", "N", "P", "Z", "S"]), max_size=6),
        st.sampled_from(
            [
                "'s",
                "'LL",
                " don't",
                "  ",
                "\n\n",
                "\r\n ",
                "\t",
                "123",
                " 4567",
                "e\u0301",
                "\u017f",
                "'\u017f",
                "...",
                " (",
                WHOLE,
                "!\n",
                "Ab",
                "\u3042",
                "中文",
                *SPECIAL,
            ]
        ),
    ),
    max_size=8,
).map("".join)


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As the models' own tokenizer.json has them.
CUTS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _bytes(True),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(True)]),
    "llama-bpe": lambda: pre_tokenizers.Sequence([_split(LLAMA3), _bytes(False)]),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [_split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), _bytes(False)]
    ),
    "seed-coder": lambda: pre_tokenizers.Sequence(
        [
            _split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}|"
                r" ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            _bytes(False),
        ]
    ),
    "gpt-4o": lambda: pre_tokenizers.Sequence(
        [
            _split(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            _bytes(False),
        ]
    ),
}


def _train(pre: str) -> Tokenizer:
    """What a model's authors publish: its ``tokenizer.json``."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = CUTS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][WHOLE.replace(" ", "Ġ")] = len(content["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def _vocabulary(tokenizer: Tokenizer, padding: int = 3) -> tuple[list[str], list[TokenType]]:
    """As `TextModel.get_vocab_base` of llama.cpp's converter."""
    added = tokenizer.get_added_tokens_decoder()
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(len(by_id) + padding):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(TokenType.UNUSED)
        elif index in added:
            is_special = added[index].special
            types.append(TokenType.CONTROL if is_special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _write(path: Path, **values: Any) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in values.items():
        method = getattr(writer, f"add_{key}")
        method(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _write_bpe(path: Path, pre: str, tokenizer: Tokenizer, **values: Any) -> Path:
    tokens, types = _vocabulary(tokenizer)
    merges = [" ".join(pair) for pair in _model(tokenizer)["merges"]]
    return _write(
        path,
        tokenizer_model="gpt2",
        tokenizer_pre=pre,
        token_list=tokens,
        token_types=types,
        token_merges=merges,
        bos_token_id=tokenizer.token_to_id("<|begin|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        chat_template=TEMPLATE,
        **values,
    )


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


@pytest.fixture(scope="module", params=CUTS)
def byte_level(request, tmp_path_factory) -> tuple[Tokenizer, FastTokenizer]:
    """The published tokenizer, and the one that is made of the file."""
    published = _train(request.param)
    path = _write_bpe(tmp_path_factory.mktemp("gguf") / "m.gguf", request.param, published)
    assert (len(published.encode(WHOLE).ids) == 1) == (request.param == "llama-bpe")
    return published, _of_file(path)


def _of_file(path: Path) -> FastTokenizer:
    tokenizer, _ = TextSource(path, files=read_text_files(path))()
    return tokenizer


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_byte_level_ids_are_those_of_the_published_tokenizer(byte_level, text):
    published, ours = byte_level
    ids = published.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False) == ids
    assert streamed(ours, [ours.token_to_id("a")], ids) == published.decode(
        ids, skip_special_tokens=False
    )
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == published.decode(
            ids, skip_special_tokens=skip
        )


def test_begin_and_end_are_put_around_a_text_where_the_file_or_its_kind_says_so(tmp_path):
    for pre, stated, expected in (
        ("llama-bpe", {}, ["<|begin|>", "a"]),
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
        ("gpt-2", {}, ["a"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<|begin|>", "a", "<|im_end|>"]),
    ):
        path = _write_bpe(tmp_path / "m.gguf", pre, _train(pre), **stated)
        tokenizer = Tokenizer.from_str(read_text_files(path).tokenizer)
        assert tokenizer.encode("a").tokens == expected
        path.unlink()


def test_a_chat_is_rendered_and_read_in_a_worker(tmp_path):
    published = _train("qwen2")
    path = _write_bpe(tmp_path / "m.gguf", "qwen2", published)
    source = pickle.loads(pickle.dumps(TextSource(path, files=read_text_files(path))))
    tokenizer, template = source()
    assert template.source == str(path)
    assert not template.is_builtin
    text = template.render([{"role": "user", "content": "Hi <|im_end|>"}])
    assert text == "<|begin|><|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == published.encode(text, add_special_tokens=False).ids
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert {tokenizer.token_to_id(token) for token in SPECIAL} == tokenizer.all_special_ids
    assert tokenizer.id_to_token(len(published.get_vocab())) == ""  # a row that pads


def test_templates_by_name_and_none_at_all(tmp_path):
    path = tmp_path / "m.gguf"
    named = [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
    ]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<|im_start|>"])
    writer.add_chat_template(named)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    _, template = TextSource(path, files=read_text_files(path))()
    messages = [{"role": "user", "content": "x"}]
    assert template.render(messages, tools=[{}, {}]) == "tools 2"
    assert "<|im_start|>user\nx" in template.render(messages)

    bare = _write(tmp_path / "bare.gguf", tokenizer_model="gpt2", token_list=["a", "<|im_start|>"])
    _, template = TextSource(bare, files=read_text_files(bare))()
    assert template.source == "built-in chatml"
    _, template = TextSource(bare, "llama3", files=read_text_files(bare))()
    assert template.source == "built-in llama3"


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _sentence_pieces() -> tuple[list[str], list[float], list[TokenType]]:
    """A vocabulary of SentencePiece's kind: control and bytes, then pieces.

    It has them by falling score; these are in another order, since it is the score that counts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    tokenizer.train_from_iterator([w for line in CORPUS for w in line.split(" ")], trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1] * 7919) % 503)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *(piece for piece, _ in pieces), "<tool>"]
    scores = [0.0] * 259 + [-float(rank) for _, rank in pieces] + [-1000.0]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces) + [TokenType.USER_DEFINED]
    return tokens, scores, types


def _write_pieces(path: Path, **values: Any) -> Path:
    tokens, scores, types = _sentence_pieces()
    return _write(
        path,
        tokenizer_model="llama",
        token_list=tokens,
        token_scores=scores,
        token_types=types,
        **values,
    )


def _by_score(text: str, ids: dict[str, int], scores: list[float], *, prefix: str) -> list[int]:
    """SentencePiece's BPE (`bpe_model.cc`): again and again the best pair, the first of equals."""
    symbols = list((prefix + text).replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[ids[a + b]], n) for n, (a, b) in enumerate(pairwise(symbols)) if a + b in ids
        ]
        if not pairs:
            break
        _, n = min(pairs)
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["prefixed", "bare"])
def sentence_piece(request, tmp_path_factory) -> tuple[FastTokenizer, bool]:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    _write_pieces(path, **({} if request.param else {"add_space_prefix": False}))
    return _of_file(path), request.param


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_sentence_piece_ids_are_those_of_its_algorithm(sentence_piece, text):
    tokenizer, prefixed = sentence_piece
    tokens, scores, types = _sentence_pieces_once()
    ids = {t: n for n, t in enumerate(tokens) if types[n] == TokenType.NORMAL}
    # The text of a special token is that token, whatever pieces it has.
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    assume(not any(t in text for n, t in enumerate(tokens) if types[n] in special))
    expected = _by_score(text, ids, scores, prefix="▁" if prefixed else "") if text else []
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    if "▁" not in text:
        assert tokenizer.decode(expected) == text
    # Behind a prompt the space of the first word stays.
    shown = tokenizer.decode([ids["a"], *expected], skip_special_tokens=False)
    assert "a" + streamed(tokenizer, [ids["a"]], expected) == shown


_made: list[Any] = []


def _sentence_pieces_once() -> tuple[list[str], list[float], list[TokenType]]:
    if not _made:
        _made.append(_sentence_pieces())
    return _made[0]


def test_sentence_piece_begins_with_its_bos_and_takes_user_defined_tokens_whole(tmp_path):
    path = _write_pieces(tmp_path / "m.gguf")
    files = read_text_files(path)
    tokenizer = Tokenizer.from_str(files.tokenizer)
    tool = tokenizer.token_to_id("<tool>")
    assert tokenizer.encode("<tool>").ids == [1, tool]
    assert files.config["bos_token"] == "<s>"
    assert files.config["eos_token"] == "</s>"
    fast, _ = TextSource(path, files=files)()
    ids = fast.encode("a<tool>ü\x00", add_special_tokens=True)
    # As in llama.cpp, what follows such a token begins with a space, as every text does.
    assert fast.decode(ids) == "a<tool> ü\x00"
    pieces = fast.pieces(skip_special_tokens=True)
    assert pieces is not None
    assert pieces.strip_left == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer_model": "bert"}, "model 'bert' is not supported; these are: gpt2, llama"),
        ({"tokenizer_pre": "zulu"}, "pre 'zulu' is not supported; these are: chatglm-bpe"),
        ({"token_merges": ["a b", "ab"]}, "merges: 'ab' is no pair"),
        ({"token_merges": ["a c"]}, "merges: 'a c' is no pair of tokens that make another"),
        ({"token_list": ["a", "b", "a"]}, "tokens names a token twice"),
        ({"token_types": [1, 1]}, "token_type has 2 entries for 3 tokens"),
        ({"tokenizer_model": "llama"}, "scores has 0 entries for 3 tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_read_is_refused_by_key(values, message, tmp_path):
    given = {"tokenizer_model": "gpt2", "token_list": ["a", "b", "ab"], **values}
    path = _write(tmp_path / "m.gguf", **given)
    with pytest.raises(ModelLoadError, match=message) as raised:
        read_text_files(path)
    assert "m.gguf: tokenizer.ggml." in str(raised.value)


def test_a_file_without_a_tokenizer(tmp_path):
    path = _write(tmp_path / "m.gguf", tokenizer_model="gpt2")
    with pytest.raises(ModelLoadError, match=r"lacks tokenizer\.ggml\.tokens: it holds no"):
        read_text_files(path)
