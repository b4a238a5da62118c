from __future__ import annotations

import pytest

from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.bad_words import spell_bad_words
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.detokenizer import IncrementalDetokenizer
from tests.engine.tokenizers_for_tests import byte_level, metaspace, no_decoder, word_piece


def test_a_word_is_spelt_as_a_beginning_and_after_a_space():
    tokenizer = byte_level()
    words = spell_bad_words(tokenizer, ["you", " you", "you"])
    bare = tuple(tokenizer.encode("you", add_special_tokens=False))
    spaced = tuple(tokenizer.encode(" you", add_special_tokens=False))
    assert words[0] == bare
    assert set(words) <= {bare, spaced}
    assert all(tokenizer.decode(word).strip() == "you" for word in words)


def test_a_space_that_is_a_token_by_itself_adds_no_spelling():
    assert spell_bad_words(ByteTokenizer(), ["ab"]) == ((97, 98),)


@pytest.mark.parametrize("kind", [no_decoder, word_piece, metaspace])
def test_special_tokens_may_stand_without_spaces_between_them(kind):
    tokenizer = kind()
    start, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))

    def text(**params):
        detokenizer = IncrementalDetokenizer(
            tokenizer, (), SamplingParams(skip_special_tokens=False, **params)
        )
        return detokenizer.add((start, end, start)) + detokenizer.finish()

    assert text(spaces_between_special_tokens=False) == "<s></s><s>"
    assert text() == tokenizer.decode([start, end, start], skip_special_tokens=False)
