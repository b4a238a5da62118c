"""What a checkpoint's tokenizer files say, read without transformers."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.tokenizer import FastTokenizer
from streamserve.errors import EngineError, InvalidParameterError, ModelLoadError
from tests.engine.tokenizers_for_tests import KINDS, TEXTS

ALL = {**KINDS, "bytes": ByteTokenizer}


def save(directory, kind="byte_level", **configs):
    backend = KINDS[kind]()._backend
    backend.save(str(directory / "tokenizer.json"))
    for name, content in configs.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_from_directory_reads_special_tokens_in_both_spellings(tmp_path):
    save(
        tmp_path,
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None},
        special_tokens_map={"unk_token": "<unk>"},
    )
    tokenizer = FastTokenizer.from_directory(tmp_path)
    assert tokenizer.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    assert tokenizer.is_special(tokenizer.token_to_id("</s>"))
    assert tokenizer.token_to_id("<unk>") is None  # nothing is added to the vocabulary


def test_a_special_token_is_special_although_tokenizer_json_does_not_know(tmp_path):
    save(tmp_path, tokenizer_config={"eos_token": "<tool call>"})
    tokenizer = FastTokenizer.from_directory(tmp_path)
    token_id = tokenizer.token_to_id("<tool call>")
    assert tokenizer.is_special(token_id)
    assert tokenizer.decode([token_id]) == ""


FLAGS = [
    {},
    {"add_bos_token": True},
    {"add_eos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": True, "bos_token": None},
    {"additional_special_tokens": ["<tool call>", "<|im_end|>"]},
    {"added_tokens_decoder": {"404": {"content": "<tool call>", "special": True}}},
]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_flags_of_a_config_mean_what_they_mean_to_transformers(tmp_path, flags, adds_bos):
    backend = Backend.from_str(KINDS["byte_level"]()._backend.to_str())
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **flags}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = FastTokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for add in (False, True):
        ids = ours.encode("hello <tool call> <|im_end|>", add_special_tokens=add)
        assert ids == theirs.encode("hello <tool call> <|im_end|>", add_special_tokens=add)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no tokenizer\.json"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json cannot be read"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json must hold a JSON object"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json cannot be read"),
    ],
)
def test_errors_name_the_file(tmp_path, files, message):
    if "tokenizer_config.json" in files:
        save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        FastTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*TEXTS, "<s>hello<|im_end|>", ""])
def test_encodes_and_decodes_as_transformers_does(kind, text):
    tokenizer = KINDS[kind]()
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == theirs.encode(text, add_special_tokens=False)
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def test_saved_truncation_and_padding_are_ignored(tmp_path):
    backend = Backend.from_str(KINDS["byte_level"]()._backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FastTokenizer.from_directory(tmp_path)
    assert 3 < len(tokenizer.encode("a b c d e f", add_special_tokens=False)) != 10


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "bytes"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind):
    tokenizer = ALL[kind]()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == text.strip()


@pytest.mark.parametrize("kind", ALL)
def test_every_id_has_a_text_and_unknown_ones_have_none(kind):
    tokenizer = ALL[kind]()
    for token_id in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.token_text(token_id), str)
    assert tokenizer.token_text(tokenizer.vocab_size) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
    assert max(tokenizer.all_special_ids) < tokenizer.vocab_size


def test_token_text_keeps_its_space():
    tokenizer = KINDS["llama"]()
    assert tokenizer.token_text(tokenizer.token_to_id("▁h")) == " h"
    assert tokenizer.token_text(tokenizer.token_to_id("<0xE4>")) == "\ufffd"
    assert tokenizer.token_bytes(tokenizer.token_to_id("<0xE4>")) == b"\xe4"
    assert tokenizer.token_text(tokenizer.token_to_id("</s>")) == "</s>"


def test_the_byte_tokenizer_reads_its_own_special_tokens():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("<s>é</s>", add_special_tokens=True) == [256, 256, 195, 169, 257]
    assert tokenizer.decode([256, 195, 169, 257]) == "é"
    assert tokenizer.decode([256, 195, 169, 257], skip_special_tokens=False) == "<s>é</s>"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ByteTokenizer(()).encode("a<s>", add_special_tokens=True) == list(b"a<s>")


@pytest.mark.parametrize("text", ["\udce4", "a\ud83d b" * 1000])
def test_half_a_surrogate_pair_is_refused(text):
    tokenizer = FastTokenizer(Backend.from_str(KINDS["byte_level"]()._backend.to_str()))
    for add_special_tokens in (False, True):
        with pytest.raises(InvalidParameterError, match="half of a surrogate pair"):
            tokenizer.encode(text, add_special_tokens=add_special_tokens)


class Panics:
    """A backend whose library meets a bug of its own."""

    class PanicException(BaseException):
        pass

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def encode_batch_fast(self, *args, **kwargs):
        raise self.PanicException("index out of bounds")

    def decode_batch(self, *args, **kwargs):
        raise self.PanicException("index out of bounds")


def test_a_panic_of_the_library_is_an_error_of_one_request(monkeypatch):
    tokenizer = FastTokenizer(Backend.from_str(KINDS["byte_level"]()._backend.to_str()))
    monkeypatch.setattr(tokenizer, "_backend", Panics(tokenizer._backend))
    for add_special_tokens in (False, True):
        with pytest.raises(InvalidParameterError, match="cannot encode"):
            tokenizer.encode("Hi", add_special_tokens=add_special_tokens)
    with pytest.raises(EngineError, match="cannot decode"):
        tokenizer.decode([1, 2])
