"""Files of ranks against what tiktoken makes of them."""

from __future__ import annotations

import base64
import unicodedata
from functools import cache

import pytest
import tiktoken
from hypothesis import assume, given
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from streamserve.engine.pieces import byte_decoder_of
from streamserve.errors import ModelLoadError
from streamserve.models import tokenizer_backend
from tests.models.vocabulary_cases import CORPUS, read, streamed, texts, write_config

# `PAT_STR` of tokenization_qwen.py, and `pat_str` of GLM 4's tokenization_chatglm.py.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
KINDS = {
    "qwen": ("qwen.tiktoken", "QWenTokenizer", QWEN_PATTERN),
    "glm4": ("tokenizer.model", "ChatGLM4Tokenizer", GLM4_PATTERN),
}


@cache
def ranks() -> dict[bytes, int]:
    """Every byte, what a byte-level BPE learns to merge, and a word that no merge leads to."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(CORPUS, trainer)
    to_bytes = byte_decoder_of({"type": "ByteLevel"}).token_to_bytes
    names = sorted(backend.get_vocab(), key=backend.token_to_id)
    tokens = [*map(to_bytes, names), b" zqxj"]
    return {token: rank for rank, token in enumerate(tokens)}


def write(directory, kind: str) -> None:
    file, class_name, _ = KINDS[kind]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks().items()]
    (directory / file).write_text("".join(lines))
    write_config(directory, class_name)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_tiktokens(kind, tmp_path):
    write(tmp_path, kind)
    tokenizer = read(tmp_path)
    judge = tiktoken.Encoding(
        "judge", pat_str=KINDS[kind][2], mergeable_ranks=ranks(), special_tokens={}
    )
    assert [tokenizer.token_bytes(rank) for rank in range(len(ranks()))] == list(ranks())
    assert tokenizer.token_to_id("<|endoftext|>") == len(ranks())
    prompt = judge.encode("hello")
    special = [tokenizer.token_bytes(id_) for id_ in range(len(ranks()), tokenizer.vocab_size)]

    @given(text=texts)
    def compare(text: str) -> None:
        assume(not any(token in text.encode() for token in special))
        normal = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        ids = judge.encode(normal, disallowed_special=())
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == normal
        assert streamed(tokenizer, prompt, ids) == normal

    compare()
    assert judge.encode("a zqxj") == [ranks()[b"a"], len(ranks()) - 1]
    assert tokenizer.encode("a zqxj", add_special_tokens=False) == judge.encode("a zqxj")


def test_special_tokens_of_qwen_and_glm4(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        write(tmp_path / kind, kind)
    first = len(ranks())
    qwen, glm4 = (read(tmp_path / kind) for kind in KINDS)
    ids = qwen.encode("<|im_start|>user\nHi<|im_end|>\n", add_special_tokens=True)
    assert (ids[0], ids[-2]) == (first + 1, first + 2)
    assert qwen.token_to_id("<|extra_204|>") == qwen.vocab_size - 1 == first + 207
    hi = glm4.encode("Hi", add_special_tokens=False)
    assert glm4.encode("Hi", add_special_tokens=True) == [first + 2, first + 4, *hi]
    assert glm4.token_to_id("<|observation|>") == first + 9
    assert glm4.vocab_size == first + 14


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"aGk= 0\naGk 1\n", r"line 2: no token and rank"),
        (b"aGk= 0\naGo= x\n", r"line 2: no token and rank"),
        (b"aGk= 0\naGo= 2\n", r"the ranks of 2 tokens are not 0, 1, 2"),
    ],
)
def test_damaged_ranks_are_named(tmp_path, content, message):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"qwen\.tiktoken.*{message}"):
        tokenizer_backend(tmp_path, trust_remote_code=False)
