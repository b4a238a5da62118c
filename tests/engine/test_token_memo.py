"""Remembered ids are those of the whole text, wherever it is cut."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from streamserve.engine import token_memo
from streamserve.engine.token_memo import MIN_CHARACTERS, TokenMemo, safe_cut_tokens
from streamserve.engine.tokenizer import FastTokenizer
from tests.engine.tokenizers_for_tests import ADDED, KINDS, SPECIAL, TEXTS

# Overlapping, nested, with spaces at their ends, parts of words.
CONTENTS = ["<a>", "<a", "a>", "<a><b>", "<b>", "aa", "a", " x", "x ", "\n", "<b>y", "é", "▁h"]
flags = st.fixed_dictionaries(
    dict.fromkeys(("lstrip", "rstrip", "normalized", "special"), st.booleans())
    | {"single_word": st.sampled_from([False, False, False, True])}
)
added_tokens = st.dictionaries(st.sampled_from(CONTENTS), flags, min_size=1, max_size=5).map(
    lambda tokens: [AddedToken(content, **given) for content, given in tokens.items()]
)


def texts_of(pieces):
    """Texts that often begin alike: each is a part of one sequence, and something else."""
    piece = st.sampled_from(pieces) | st.text(max_size=3)
    sequence = st.lists(piece, max_size=14)
    cut = st.tuples(st.integers(0, 14), st.lists(piece, max_size=4))
    cuts = st.lists(cut, min_size=1, max_size=6)
    return st.tuples(sequence, cuts).map(
        lambda drawn: ["".join([*drawn[0][:n], *rest]) for n, rest in drawn[1]]
    )


def check(backend, tokens, texts, max_bytes):
    def encode(text):
        return backend.encode(text, add_special_tokens=False).ids

    memo = TokenMemo(encode, tokens, max_bytes=max_bytes)
    for text in texts * 2:
        assert memo.encode(text) == encode(text)


@pytest.mark.parametrize("kind", KINDS)
@given(
    texts=texts_of([*SPECIAL, *(t.content for t in ADDED), *TEXTS, " ", "hello", "<|im_"]),
    max_bytes=st.sampled_from([200, 10_000]),
)
def test_ids_are_those_of_the_whole_text(kind, texts, max_bytes):
    backend = KINDS[kind]()._backend
    tokens = safe_cut_tokens(backend.get_added_tokens_decoder().values())
    assert set(SPECIAL) <= set(tokens)
    check(backend, tokens, texts, max_bytes)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "word_piece"])
@settings(max_examples=300)
@given(added=added_tokens, data=st.data())
def test_whatever_tokens_were_added(kind, added, data):
    backend = Tokenizer.from_str(KINDS[kind]()._backend.to_str())
    backend.add_tokens(added)
    tokens = safe_cut_tokens(backend.get_added_tokens_decoder().values())
    assert set(SPECIAL) <= set(tokens) or not tokens
    if tokens:
        texts = data.draw(texts_of([*(token.content for token in added), " ", "hello"]))
        assume(all(can_encode(backend, text) for text in texts))
        check(backend, tokens, texts, 10_000)


def can_encode(backend, text) -> bool:
    """False where the library itself gives up: its own tokens overlap in a way it panics at."""
    try:
        backend.encode(text, add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("added", "safe"),
    [
        ([AddedToken("<a>", normalized=False)], ["<a>"]),
        ([AddedToken("<a>", normalized=False, rstrip=True)], ["<a>"]),
        ([AddedToken("<a>", normalized=True)], []),
        ([AddedToken("<a>", normalized=False, lstrip=True)], []),
        ([AddedToken("<a>", normalized=False, single_word=True)], []),
        ([AddedToken(" a", normalized=False)], []),
        ([AddedToken("aba", normalized=False)], []),  # ababa
        ([AddedToken(t, normalized=False) for t in ("<a>", "<a>b")], ["<a>b"]),
        ([AddedToken(t, normalized=False) for t in ("<a>", "x<a")], ["x<a"]),
        ([AddedToken(t, normalized=False) for t in ("<a>", "x<a>y")], ["x<a>y"]),
        (
            [
                AddedToken("<a>", normalized=False),
                AddedToken("b", normalized=False, single_word=True),
            ],
            [],
        ),
    ],
)
def test_where_a_text_may_be_cut(added, safe):
    assert safe_cut_tokens(added) == safe


class Counting:
    """Counts the characters that are tokenised."""

    def __init__(self):
        self.num_characters = 0

    def __call__(self, text):
        self.num_characters += len(text)
        return list(text.encode())


def test_the_next_turn_tokenises_what_is_new():
    encode = Counting()
    memo = TokenMemo(encode, ["<s>"])
    history = "<s>system<s>" + "user " * 1000
    memo.encode(history + "<s>assistant")
    encode.num_characters = 0
    second = history + "<s>assistant: yes<s>user: no<s>assistant"
    assert memo.encode(second) == list(second.encode())
    assert encode.num_characters == len(second) - len(history)
    encode.num_characters = 0
    memo.encode(second)
    assert encode.num_characters == len("<s>assistant")


def test_with_another_salt_nothing_is_remembered():
    encode = Counting()
    memo = TokenMemo(encode, ["<s>"])
    text = "<s>" + "user " * 1000 + "<s>assistant"
    memo.encode(text, "alice")
    for salt, num_characters in (
        ("bob", len(text)),
        ("", len(text)),
        ("alice", len("<s>assistant")),
    ):
        encode.num_characters = 0
        assert memo.encode(text, salt) == list(text.encode())
        assert encode.num_characters == num_characters


def test_without_a_salt_a_tokenizer_remembers_nothing():
    tokenizer = KINDS["byte_level"]()
    text = "<|im_start|>" + "hello " * MIN_CHARACTERS + "<|im_end|>"
    for salt, num_entries in ((None, 0), ("bob", 1), ("alice", 2), ("bob", 2)):
        tokenizer.encode(text, add_special_tokens=False, salt=salt)
        assert len(tokenizer._memo._entries) == num_entries


def test_what_was_used_longest_ago_is_forgotten():
    encode = Counting()
    memo = TokenMemo(encode, ["<s>"], max_bytes=15_000)  # two of them
    first, second, third = (letter * 1000 + "<s>" for letter in "abc")
    for text in (first, second, first, third):
        memo.encode(text)
    encode.num_characters = 0
    memo.encode(first)
    memo.encode(third)
    assert encode.num_characters == 2 * len("<s>")
    memo.encode(second)
    assert encode.num_characters == 2 * len("<s>") + len(second)


def test_so_many_are_remembered_at_most(monkeypatch):
    monkeypatch.setattr(token_memo, "_MAX_ENTRIES", 2)
    memo = TokenMemo(Counting(), ["<s>"])
    for letter in "abc":
        memo.encode(letter + "<s>")
    assert [text for _, text in memo._entries] == ["b<s>", "c<s>"]


def test_two_threads_that_tokenise_one_text_remember_it_once():
    def encode(text):
        if text == "a":
            calls.append(text)
            if len(calls) == 1:
                memo.encode("a<s>")  # the other one, and it is faster
        return list(text.encode())

    calls, memo = [], TokenMemo(encode, ["<s>"], max_bytes=10_000)
    memo.encode("a<s>")
    assert len(calls) == 2
    num_bytes = memo._num_bytes
    memo.encode("b<s>")
    assert memo._num_bytes == 2 * num_bytes


def test_a_tokenizer_remembers_long_texts():
    tokenizer = KINDS["byte_level"]()
    assert isinstance(tokenizer, FastTokenizer)
    text = "<|im_start|>" + TEXTS[0] * (MIN_CHARACTERS // 10) + "<|im_end|>"
    for more in ("", "x", "<|im_start|>", "<|im_start|>yes"):
        for add_special_tokens in (False, True):
            expected = tokenizer._backend.encode(text + more, add_special_tokens=add_special_tokens)
            got = tokenizer.encode(
                text + more, add_special_tokens=add_special_tokens, salt="its owner's"
            )
            assert got == expected.ids
