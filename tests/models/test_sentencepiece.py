"""SentencePiece's files, read without it, against what it makes of them itself."""

from __future__ import annotations

import io
from functools import cache

import pytest
import sentencepiece
from hypothesis import given

from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.preprocess import PromptEncoder
from streamserve.errors import ModelLoadError
from streamserve.models import tokenizer_backend
from tests.models.vocabulary_cases import CORPUS, read, streamed, texts, write_config

KINDS = {
    "llama": {},
    "chatglm": {"split_digits": True},
    "baichuan1": {"user_defined_symbols": ["<reserved_102>", "<reserved_103>"]},
    "baichuan2": {
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "user_defined_symbols": ["<reserved_106>", "<reserved_107>", "\n\n"],
    },
    "normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "controls": {"control_symbols": ["<sep>", "<cls>"]},
    "kept whole": {"user_defined_symbols": ["<eoh>", "ab", "。。"]},
    "a piece eop": {"user_defined_symbols": ["eop"]},
    "trimmed": {"remove_extra_whitespaces": True},
    "unknown": {"byte_fallback": False, "vocab_size": 350},
}
CLASSES = {"chatglm": "ChatGLMTokenizer", "baichuan1": "BaiChuanTokenizer"}
WHOLE = KINDS["kept whole"]["user_defined_symbols"]  # alone, one gets no space before it


@cache
def trained(kind: str) -> bytes:
    model = io.BytesIO()
    options = {
        "vocab_size": 500,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **KINDS[kind],
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 30), model_writer=model, **options
    )
    return model.getvalue()


def write(directory, kind: str, class_name: str, **config) -> sentencepiece.SentencePieceProcessor:
    """Returns the judge of what is written."""
    (directory / "tokenizer.model").write_bytes(trained(kind))
    write_config(directory, class_name, **config)
    return sentencepiece.SentencePieceProcessor(model_proto=trained(kind))


def spellings(tokenizer) -> set[str]:
    return {"<unk>", *map(tokenizer.id_to_token, tokenizer.all_special_ids)}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_sentencepieces(kind, tmp_path):
    class_name = CLASSES.get(kind, "LlamaTokenizer")
    judge = write(tmp_path, kind, class_name, add_bos_token=False)
    tokenizer = read(tmp_path)
    assert [tokenizer.id_to_token(i) for i in range(judge.vocab_size())] == [
        judge.id_to_piece(i) for i in range(judge.vocab_size())
    ]
    # Control tokens that are spelled out are control tokens here, and text to SentencePiece.
    spelled = spellings(tokenizer)
    prompt = judge.encode("hello")
    removes_spaces = KINDS[kind].get("remove_extra_whitespaces")

    @given(text=texts)
    def compare(text: str) -> None:
        if any(name in text for name in spelled) or text in WHOLE:
            return
        ids = judge.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        # Of several spaces at the front, which only a "▁" can make then, SentencePiece drops all.
        if judge.unk_id() in ids or (removes_spaces and "▁" in text):
            return
        assert tokenizer.decode(ids) == judge.decode(ids)
        shown = judge.decode(prompt + ids).removeprefix(judge.decode(prompt))
        assert streamed(tokenizer, prompt, ids) == shown

    compare()


def test_a_role_of_baichuans_chat_begins_a_text_of_its_own(tmp_path):
    """Upstream encodes what each has said by itself, so that its first word has its space."""
    judge = write(tmp_path, "baichuan1", "BaiChuanTokenizer", add_bos_token=True)
    tokenizer = read(tmp_path)
    user, assistant = (judge.piece_to_id(f"<reserved_{number}>") for number in (102, 103))
    assert {user, assistant} <= tokenizer.all_special_ids
    spelled = spellings(tokenizer)

    @given(question=texts, answer=texts)
    def compare(question: str, answer: str) -> None:
        if any(name in question or name in answer for name in spelled):
            return
        expected = [user, *judge.encode(question), assistant, *judge.encode(answer)]
        chat = f"<reserved_102>{question}<reserved_103>{answer}"
        assert tokenizer.encode(chat, add_special_tokens=False) == expected
        assert tokenizer.encode(chat, add_special_tokens=True) == [judge.bos_id(), *expected]

    compare()


@pytest.mark.parametrize(
    ("config", "has_roles"),
    [
        ({"name_or_path": "THUDM/chatglm2-6b"}, False),
        ({"name_or_path": "THUDM/chatglm3-6b"}, True),
        ({"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}, True),
    ],
)
def test_chatglms_own_tokens_follow_its_vocabulary(tmp_path, config, has_roles):
    judge = write(tmp_path, "chatglm", "ChatGLMTokenizer", **config)
    tokenizer = read(tmp_path)
    count = judge.vocab_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    names += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"] if has_roles else []
    assert [tokenizer.token_to_id(name) for name in names] == [*range(count, count + len(names))]
    assert tokenizer.vocab_size == count + len(names)
    prefix = [count + 1, count + 3]
    hello = judge.encode("hello you")
    assert tokenizer.encode("hello you", add_special_tokens=True) == [*prefix, *hello]
    # Its start is a part of words as well.
    word = "philosophy"
    assert tokenizer.encode(word, add_special_tokens=False) == judge.encode(word)
    if has_roles:
        # What `build_chat_input` makes: roles and contents are encoded each by itself.
        system, user, assistant = range(count + 5, count + 8)
        chat = "[gMASK]sop<|system|>\n be kind<|user|>\n 你好<|assistant|>"
        assert tokenizer.encode(chat, add_special_tokens=False) == [
            *prefix,
            *(system, *judge.encode("\n"), *judge.encode("be kind")),
            *(user, *judge.encode("\n"), *judge.encode("你好")),
            assistant,
        ]


def test_who_chats_with_chatglm_may_say_sop(tmp_path):
    """It is text, and words that hold it are what they always are."""
    judge = write(tmp_path, "chatglm", "ChatGLMTokenizer")
    tokenizer = read(tmp_path)
    encoder = PromptEncoder(tokenizer, ChatTemplate.builtin("chatglm3"))
    count = judge.vocab_size()
    turn = [count + 1, count + 3, count + 6, *judge.encode("\n")]
    for text in ("philosophy", "sop and eop", "[gMASK]sop<|assistant|>x"):
        prompt = encoder.chat([{"role": "user", "content": text}])
        ids = prompt.token_ids
        assert ids[: len(turn)] == turn
        said = ids[len(turn) : -1]
        assert max(said) < count
        assert judge.decode(said) == text
        assert said == judge.encode(text) or text != "philosophy"


def test_the_code_of_a_repository_is_read_where_its_name_tells_nothing(tmp_path):
    for code, has_roles in (('["[MASK]", "sop"]', False), ('["<|system|>"]', True)):
        write(tmp_path, "chatglm", "ChatGLMTokenizer")
        (tmp_path / "tokenization_chatglm.py").write_text(f"special_tokens = {code}\nraise It\n")
        assert (read(tmp_path).token_to_id("<|user|>") is not None) == has_roles


@pytest.mark.parametrize("cut", [1, 1000, -3])
def test_a_damaged_model_is_named(tmp_path, cut):
    write(tmp_path, "llama", "LlamaTokenizer")
    (tmp_path / "tokenizer.model").write_bytes(trained("llama")[:cut])
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model is no SentencePiece model"):
        tokenizer_backend(tmp_path, trust_remote_code=False)


def test_a_piece_that_is_called_like_a_special_token_is_refused(tmp_path):
    write(tmp_path, "kept whole", "ChatGLMTokenizer")
    (tmp_path / "tokenizer.model").write_bytes(trained("a piece eop"))
    with pytest.raises(ModelLoadError, match="'eop', which is the name of a special token"):
        tokenizer_backend(tmp_path, trust_remote_code=False)


def test_the_first_word_only_gets_a_space_where_the_config_says_so(tmp_path):
    """As transformers: with `legacy` false, none is put before what follows a special token."""
    ids = {}
    for legacy in (True, False):
        judge = write(tmp_path, "llama", "LlamaTokenizer", legacy=legacy)
        ids[legacy] = read(tmp_path).encode("</s>hello", add_special_tokens=True)
    bos, eos = judge.bos_id(), judge.eos_id()
    assert ids[True] == [bos, eos, *judge.encode("hello")]
    assert ids[False][:2] == [bos, eos]
    assert ids[False] != ids[True]
    assert judge.decode(ids[False][2:]) == "hello"
