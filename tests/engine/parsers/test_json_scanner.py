"""The scanner says of every text what Python's own parser says of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.parsers.json_scanner import JsonScanner
from tests.engine.parsers.cutting import cuts, pieces

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=4)


@given(objects, st.sampled_from([None, 1]), st.booleans(), cuts)
def test_an_object_is_read_to_its_end(value, indent, ensure_ascii, bounds):
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
    scanner = JsonScanner()
    num_consumed = sum(scanner.feed(piece) for piece in pieces(f" {text} and more", bounds))
    assert scanner.is_done
    assert not scanner.is_broken
    assert num_consumed == len(text) + 1
    members = {k: json.loads(scanner.text[a:b]) for k, (a, b) in scanner.members.items()}
    assert members == value


@given(objects, st.data(), cuts)
def test_a_changed_character_is_noticed_as_python_notices_it(value, data, bounds):
    text = list(json.dumps(value))
    position = data.draw(st.integers(1, len(text) - 1))
    text[position] = data.draw(st.sampled_from('{}[]",:\\u01.-eEtn \n\x00'))
    changed = "".join(text)
    scanner = JsonScanner()
    num_consumed = 0
    for piece in pieces(changed, bounds):
        num_consumed += scanner.feed(piece)
        if scanner.is_done or scanner.is_broken:
            break
    try:
        pairs, end = json.JSONDecoder(object_pairs_hook=list).raw_decode(changed)
    except ValueError:
        assert not scanner.is_done
        return
    if len(dict(pairs)) < len(pairs):
        assert scanner.is_broken
    else:
        assert scanner.is_done
        assert num_consumed == end


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        '"a"',
        "x",
        "{,}",
        '{"a"}',
        '{"a":}',
        '{"a":1,}',
        '{"a":01}',
        '{"a":tru}',
        '{"a":1}}',
        '{"a":"\\u12g4"}',
        '{"a":"\\u123g"}',
    ],
)
def test_what_is_no_object(text):
    scanner = JsonScanner()
    num_consumed = scanner.feed(text)
    assert num_consumed < len(text)
    assert scanner.is_broken == (text != '{"a":1}}')
