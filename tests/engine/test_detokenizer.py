"""Whatever the cuts, what comes out is what ``decode`` of the whole gives."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.detokenizer import IncrementalDetokenizer
from streamserve.engine.tokenizer import FastTokenizer
from tests.engine.tokenizers_for_tests import FAST_KINDS, KINDS, TEXTS, RecordedDecodes

REPLACEMENT = "\ufffd"
PARAMS = {skip: SamplingParams(skip_special_tokens=skip) for skip in (False, True)}
TOKENIZERS = {**KINDS, "bytes": ByteTokenizer}
cuts = st.sets(st.integers(0, 40))


def pieces_of(ids, edges):
    bounds = sorted({0, len(ids), *(edge for edge in edges if edge < len(ids))})
    return [ids[a:b] for a, b in itertools.pairwise(bounds)]


def stream(tokenizer, prompt, ids, edges=range(100), *, skip=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, PARAMS[skip])
    chunks = [detokenizer.add(piece) for piece in pieces_of(ids, edges)]
    return chunks, detokenizer.finish()


def assert_continues(tokenizer, prompt, ids, text, *, skip):
    """``text`` is what the whole has behind the prompt's complete characters."""
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    assert whole.endswith(text)
    head = whole[: len(whole) - len(text)]
    assert head == before or (before.startswith(head) and before.endswith(REPLACEMENT))


def byte_ids(tokenizer):
    """The byte tokens of a tokenizer with byte fallback."""
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]


@st.composite
def ids_of(draw, tokenizer, *, min_size=0):
    """Any ids, two unknown ones among them; byte-fallback tokens only as whole characters."""
    top = tokenizer.vocab_size + 2
    if "byte_fallback" not in tokenizer_kind(tokenizer):
        return draw(st.lists(st.integers(0, top - 1), min_size=min_size, max_size=12))
    table = byte_ids(tokenizer)
    plain = st.sampled_from([i for i in range(top) if i not in table]).map(lambda i: [i])
    spelled = st.characters(codec="utf-8").map(lambda c: [table[b] for b in c.encode()])
    parts = draw(st.lists(st.one_of(plain, spelled), min_size=min_size, max_size=12))
    return list(itertools.chain.from_iterable(parts))


def tokenizer_kind(tokenizer):
    pieces = tokenizer.pieces(skip_special_tokens=False)
    return "byte_fallback" if pieces is not None and pieces.per_byte else "other"


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), edges=cuts, skip=st.booleans())
def test_equals_decode_of_the_whole(kind, data, edges, skip):
    tokenizer = TOKENIZERS[kind]()
    prompt = data.draw(ids_of(tokenizer, min_size=1))
    ids = data.draw(ids_of(tokenizer, min_size=1))
    chunks, rest = stream(tokenizer, prompt, ids, edges, skip=skip)
    assert_continues(tokenizer, prompt, ids, "".join(chunks) + rest, skip=skip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(max_size=30), edges=cuts, prompt=st.sampled_from(TEXTS))
def test_any_text_that_a_tokenizer_can_spell(kind, text, edges, prompt):
    tokenizer = TOKENIZERS[kind]()
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    chunks, rest = stream(tokenizer, prompt_ids, ids, edges)
    if ids:
        assert_continues(tokenizer, prompt_ids, ids, "".join(chunks) + rest, skip=True)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_general", "llama", "gemma", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_chunk_ends_inside_a_character(kind, text):
    tokenizer = TOKENIZERS[kind]()
    prompt = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    chunks, rest = stream(tokenizer, prompt, ids)
    assert not any(REPLACEMENT in chunk for chunk in chunks)
    assert rest == ""
    assert "".join(chunks).strip() == text.strip()


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_general", "llama", "gemma", "bytes"])
@given(character=st.characters(min_codepoint=128, codec="utf-8"), data=st.data())
def test_the_bytes_of_an_unfinished_character_come_out_at_the_end(kind, character, data):
    tokenizer = TOKENIZERS[kind]()
    if tokenizer_kind(tokenizer) == "byte_fallback":
        table = byte_ids(tokenizer)
    elif kind == "bytes":
        table = list(range(256))
    else:
        same_ids = TOKENIZERS["byte_level"]()
        table = {same_ids.token_bytes(i): i for i in range(same_ids.vocab_size)}
        table = [table[bytes([byte])] for byte in range(256)]
    encoded = character.encode()
    ids = [table[byte] for byte in encoded[: data.draw(st.integers(1, len(encoded) - 1))]]
    prompt = [table[ord("a")]]
    chunks, rest = stream(tokenizer, prompt, ids)
    assert "".join(chunks) == ""
    assert rest == tokenizer.decode(prompt + ids)[1:]


def fallback_text(data):
    """What a run of byte tokens shows: whole characters, one U+FFFD for every other byte."""
    text = ""
    while data:
        size = next((n for n in (1, 2, 3, 4) if is_character(data[:n])), None)
        text += REPLACEMENT if size is None else data[:size].decode()
        data = data[size or 1 :]
    return text


def is_character(data):
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@given(data=st.binary(min_size=1, max_size=12), edges=cuts)
def test_an_invalid_run_of_bytes_keeps_its_whole_characters(kind, data, edges):
    tokenizer = TOKENIZERS[kind]()
    table = byte_ids(tokenizer)
    chunks, rest = stream(tokenizer, [table[ord("a")]], [table[b] for b in data], edges)
    assert "".join(chunks) + rest == fallback_text(data)


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_common_decoders_have_the_fast_way(kind):
    assert TOKENIZERS[kind]().pieces(skip_special_tokens=True) is not None


@pytest.mark.parametrize("kind", FAST_KINDS)
@pytest.mark.parametrize("token", ["<tool call>", "｜工具｜", "<0xZZ>"])
def test_added_tokens_are_written_as_they_are(kind, token):
    backend = Tokenizer.from_str(TOKENIZERS[kind]()._backend.to_str())
    backend.add_tokens([token])
    tokenizer = FastTokenizer(backend)
    first, token_id = map(backend.token_to_id, ("h", token))
    assert stream(tokenizer, [first], [token_id, first])[0] == [token, "h"]
    assert tokenizer.token_text(token_id) == token


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [decoders.Strip(" ", 1, 1)],
        [decoders.Strip("_", 1, 0)],
        [decoders.Strip(" ", 1, 0), decoders.Fuse()],
        [decoders.Fuse()],
    ],
)
@pytest.mark.parametrize("space", ["▁", "_"])
def test_a_decoder_with_an_unknown_detail_goes_the_general_way(space, steps):
    backend = Tokenizer.from_str(TOKENIZERS["gemma"]()._backend.to_str())
    first = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*first, *steps])
    is_known = space == "▁" and not steps
    assert (FastTokenizer(backend).pieces(skip_special_tokens=True) is not None) is is_known


def test_unknown_decoders_do_not():
    assert TOKENIZERS["word_piece"]().pieces(skip_special_tokens=True) is None
    assert TOKENIZERS["byte_level_general"]().pieces(skip_special_tokens=True) is None


def test_the_space_of_the_first_word_stays_behind_a_prompt_and_goes_without_one():
    tokenizer = TOKENIZERS["llama"]()
    bos, word = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("▁h")
    assert stream(tokenizer, [word], [word, word])[0] == [" h", " h"]
    assert stream(tokenizer, [bos], [word, word])[0] == ["h", " h"]
    assert stream(tokenizer, [bos], [tokenizer.token_to_id("h"), word])[0] == ["h", " h"]
    assert stream(tokenizer, [bos], [word, word], skip=False)[0] == [" h", " h"]


@pytest.mark.parametrize(
    ("skip", "spaced", "text"),
    [
        (False, True, " <s> </s> world <s> <s>"),
        (False, False, " <s></s> world <s><s>"),
        (True, False, " world"),
    ],
)
def test_no_space_between_special_tokens_where_none_is_asked_for(skip, spaced, text):
    tokenizer = TOKENIZERS["word_piece"]()
    ids = list(map(tokenizer.token_to_id, ("<s>", "</s>", "world", "<s>", "<s>")))
    params = SamplingParams(skip_special_tokens=skip, spaces_between_special_tokens=spaced)
    detokenizer = IncrementalDetokenizer(tokenizer, [tokenizer.token_to_id("hello")], params)
    assert detokenizer.add(ids) + detokenizer.finish() == text


def test_the_general_way_looks_behind_tokens_without_text():
    tokenizer = TOKENIZERS["word_piece"]()
    hello, special, world = map(tokenizer.token_to_id, ("hello", "</s>", "world"))
    chunks, rest = stream(tokenizer, [hello, *[special] * 9], [world])
    assert "".join(chunks) + rest == " world"


@pytest.mark.parametrize("kind", ["word_piece", "byte_level_general"])
def test_the_general_way_looks_at_a_bounded_window(kind):
    tokenizer = TOKENIZERS[kind]()
    recording = RecordedDecodes(tokenizer)
    broken = [i for i in range(tokenizer.vocab_size) if REPLACEMENT in tokenizer.decode([i])]
    special = [tokenizer.token_to_id("</s>")] * 500
    detokenizer = IncrementalDetokenizer(recording, [1, 2, 3], PARAMS[True])
    detokenizer.add([*special, *broken[:1] * 500])
    assert max(recording.sizes) < 100
