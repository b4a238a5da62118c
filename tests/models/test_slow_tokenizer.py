"""Tokenizers in Python: which there are, what they make of a text, and their streams."""

from __future__ import annotations

import json
import pickle
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.cli.args import parse_args
from streamserve.cli.compose import text_source
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.detokenizer import IncrementalDetokenizer
from streamserve.errors import ConfigError, InvalidParameterError, ModelLoadError
from streamserve.models import tokenizer_backend
from streamserve.models.slow_tokenizer import SlowTokenizer
from tests.engine.tokenizers_for_tests import RecordedDecodes
from tests.models.test_sentencepiece import trained
from tests.models.vocabulary_cases import texts
from tools.make_checkpoint import write_config

REPLACEMENT = "\ufffd"
# As the repositories of Qwen 1 have it: a vocabulary of bytes, half characters become U+FFFD.
OWN_CODE = """
from pathlib import Path

from transformers import PreTrainedTokenizer


class BytesTokenizer(PreTrainedTokenizer):
    def __init__(self, **given):
        self.ranks = {bytes([byte]): byte for byte in range(256)}
        self.ranks |= {b"th": 256, b"the": 257, " é".encode(): 258}
        self.names = {rank: token for token, rank in self.ranks.items()}
        super().__init__(eos_token="<|end|>", **given)

    @property
    def vocab_size(self):
        return len(self.ranks)

    def get_vocab(self):
        return self.ranks

    def _tokenize(self, text, **options):
        data, tokens = text.encode(), []
        while data:
            size = next(n for n in (3, 2, 1) if data[:n] in self.ranks)
            tokens.append(data[:size])
            data = data[size:]
        return tokens

    def _convert_token_to_id(self, token):
        return self.ranks[token]

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        data = b"".join(t.encode() if isinstance(t, str) else t for t in tokens)
        return data.decode("utf-8", "replace")
"""


def write_ctrl(directory: Path) -> None:
    """Parts of words end in ``@@``, which goes when the next one comes."""
    letters = "abcdehlotw.,!é中"
    pieces = [*letters, *(letter + "@@" for letter in letters), "he@@", "llo", "the", "wo@@"]
    vocab = {piece: number for number, piece in enumerate(["<unk>", *pieces, "a\n", "\n"])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    merges = ["h e", "l l", "ll o</w>", "t h", "th e</w>", "w o"]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def write_kind(directory: Path, kind: str) -> Path:
    name = {"ctrl": "CTRLTokenizer", "gpt_sw3": "GPTSw3Tokenizer", "byt5": "ByT5Tokenizer"}
    config = {"tokenizer_class": name.get(kind, "BytesTokenizer")}
    model_type = {"ctrl": "ctrl", "byt5": "t5"}.get(kind, "gpt2")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if kind == "ctrl":
        write_ctrl(directory)
    elif kind == "gpt_sw3":
        (directory / "spiece.model").write_bytes(trained("llama"))
        config["name_or_path"] = "gpt-sw3"
    elif kind == "own code":
        (directory / "tokenization_own.py").write_text(OWN_CODE)
        config["auto_map"] = {"AutoTokenizer": ["tokenization_own.BytesTokenizer", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


KINDS = ("ctrl", "gpt_sw3", "byt5", "own code")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A kind -> its tokenizer, made once."""
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))  # transformers copies code there
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        patch.syspath_prepend(modules)

        @cache
        def slow(kind: str) -> SlowTokenizer:
            directory = write_kind(tmp_path_factory.mktemp("slow"), kind)
            return tokenizer_backend(directory, trust_remote_code=True, slow=True)

        yield slow


def stream(tokenizer, prompt, ids, *, skip: bool) -> list[str]:
    params = SamplingParams(skip_special_tokens=skip)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, params)
    return [*(detokenizer.add([token]) for token in ids), detokenizer.finish()]


def assert_continues(tokenizer, prompt, ids, *, skip: bool = True) -> None:
    """What is streamed is what the whole has behind what of the prompt stays."""
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    text = "".join(stream(tokenizer, prompt, ids, skip=skip))
    assert whole.endswith(text)
    head = whole[: len(whole) - len(text)]
    assert before.startswith(head)
    # Of the prompt's own only what its next token takes back, or half a character, is streamed.
    assert len(before) - len(head) <= 4 or before.endswith(REPLACEMENT)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_are_streamed_as_they_are_decoded_together(kind, slow, data, skip):
    tokenizer = slow(kind)
    some = st.integers(0, tokenizer.vocab_size + 1)
    prompt = data.draw(st.lists(some, min_size=1, max_size=6))
    ids = data.draw(st.lists(some, min_size=1, max_size=40))
    # GPT-SW3 puts a space before all that stands in front of a special token.
    assert_continues(tokenizer, prompt, ids, skip=skip or kind == "gpt_sw3")


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_any_text_is_streamed_as_it_is_decoded(kind, slow, text):
    tokenizer = slow(kind)
    prompt = tokenizer.encode("the", add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    theirs = tokenizer.python_tokenizer
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(
        ids, clean_up_tokenization_spaces=False
    )
    assert_continues(tokenizer, prompt, ids)


def test_a_text_comes_one_token_late_and_never_half_a_character(slow):
    tokenizer = slow("own code")
    chunks = stream(tokenizer, [257], [*"a中b".encode()], skip=True)
    assert chunks == ["", "a", "", "", "中", "b"]
    ctrl = slow("ctrl")
    ids = [ctrl.token_to_id(token) for token in ("the", "he@@", "llo", "the")]
    assert stream(ctrl, [], ids, skip=True) == ["", "the", " he", "llo", " the"]


def test_a_run_of_tokens_without_text_is_not_lost(slow):
    """At the end of a text they are stripped off."""
    tokenizer = slow("ctrl")
    word, newline = tokenizer.token_to_id("the"), tokenizer.token_to_id("\n")
    assert_continues(tokenizer, [word], [word, *[newline] * 50, word])


def test_the_window_stays_small(slow):
    tokenizer = slow("gpt_sw3")
    recording = RecordedDecodes(tokenizer)
    text = " ".join(["hello there, how are you today?"] * 20)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(recording, ids[:1], ids[1:], skip=True)).endswith("you today?")
    special = min(tokenizer.all_special_ids)
    stream(recording, ids[:1], [special] * 500, skip=True)
    assert max(recording.sizes) < 40


def test_what_the_engine_asks(slow):
    tokenizer = slow("own code")
    end = tokenizer.token_to_id("<|end|>")
    assert tokenizer.all_special_ids == {end}
    assert tokenizer.special_tokens == {"eos_token": "<|end|>"}
    assert tokenizer.vocab_size == end + 1
    assert tokenizer.encode("the<|end|>", add_special_tokens=True) == [257, end]
    assert tokenizer.decode([257, end, 9999]) == "the"
    assert (tokenizer.id_to_token(257), tokenizer.id_to_token(9999)) == ("the", "")
    assert tokenizer.token_bytes(257) == b"the"
    assert tokenizer.pieces(skip_special_tokens=True) is None
    with pytest.raises(InvalidParameterError, match="cannot encode this text"):
        tokenizer.encode("half \ud83d", add_special_tokens=False)


def test_auto_takes_a_python_tokenizer_where_there_is_no_other(tmp_path):
    made = tokenizer_backend(write_kind(tmp_path, "ctrl"), trust_remote_code=False)
    assert isinstance(made, SlowTokenizer)


def test_code_of_the_checkpoints_own_runs_only_where_it_is_trusted(tmp_path):
    write_kind(tmp_path, "own code")
    with pytest.raises(ModelLoadError, match=r"tokenization_own.* only with --trust-remote-code"):
        tokenizer_backend(tmp_path, trust_remote_code=False, slow=True)


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"]
)
def test_a_class_that_transformers_has_in_rust_only_is_refused_by_name(tmp_path, name):
    write_config("tiny", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ModelLoadError, match=rf"transformers 5\S* has no .* Python for {name}: le"):
        tokenizer_backend(tmp_path, trust_remote_code=False, slow=True)


def test_a_damaged_vocabulary_is_an_error_of_ours(tmp_path):
    write_kind(tmp_path, "ctrl")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"in Python of .* cannot be made"):
        tokenizer_backend(tmp_path, trust_remote_code=False, slow=True)


def test_the_flag_reaches_the_engine_and_its_workers(tmp_path):
    write_kind(tmp_path, "ctrl")
    args = parse_args(["serve", "--tokenizer-mode", "slow"])
    tokenizer, _ = pickle.loads(pickle.dumps(text_source(args, tmp_path)))()
    assert isinstance(tokenizer, SlowTokenizer)
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ConfigError, match=r"--tokenizer-mode slow: .*gguf holds a vocabulary"):
        text_source(args, file)
