"""Stop strings: the same answer however the text is cut, and nothing held back for nothing."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamserve.core.thinking import ThoughtText
from streamserve.engine.stop import StopChecker, StopCheckerBehindThoughts

letters = st.text("abc", max_size=12)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


def reference(text, stops, include, *, first_end=0):
    """(what is shown, match): the match that ends first, the longest of those that end there."""
    for end in range(first_end + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(checker, chunks, may_stop=itertools.repeat(True)):
    shown = []
    for chunk, may in zip(chunks, may_stop, strict=False):
        certain, matched = checker.add(chunk, may_stop=may)
        shown.append(certain)
        if matched is not None:
            return shown, matched
    return [*shown, checker.flush()], None


@given(chunks=st.lists(letters, max_size=6), stops=stop_lists, include=st.booleans())
def test_the_cuts_do_not_matter(chunks, stops, include):
    shown, matched = run(StopChecker(stops, include), chunks)
    assert ("".join(shown), matched) == reference("".join(chunks), stops, include)


@given(
    is_open=st.booleans(),
    before=st.sampled_from(["", " ", "\n"]),
    thoughts=st.text("ab<", max_size=6),
    gap=st.sampled_from(["", "\n\n"]),
    behind=st.text("abc<", max_size=8),
    stops=stop_lists,
    include=st.booleans(),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@example(
    is_open=True,
    before="",
    thoughts="a",
    gap="\n\n",
    behind="b",
    stops=("\n",),
    include=False,
    cuts=[6],
)
def test_thoughts_are_not_searched(is_open, before, thoughts, gap, behind, stops, include, cuts):
    """Nor what is around them; and the cuts do not matter."""
    start = before if is_open else f"{before}<a>"
    thought = f"{start}{thoughts}</a>{gap}"
    text = thought + behind
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(bounds)]
    where = ThoughtText(is_open=is_open, start="<a>", end="</a>")
    shown, matched = run(StopCheckerBehindThoughts(stops, include, where), chunks)
    found, stop = reference(behind, stops, include)
    assert ("".join(shown), matched) == (thought + found, stop)


@given(text=st.text("abc<> ", max_size=8), stops=stop_lists, size=st.integers(1, 3))
@example(text="<", stops=("b",), size=1)
def test_an_answer_without_thoughts_is_searched_from_its_beginning(text, stops, size):
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    where = ThoughtText(is_open=False, start="<a>", end="</a>")
    shown, matched = run(StopCheckerBehindThoughts(stops, False, where), chunks)
    if not text.lstrip().startswith("<a>"):
        is_undecided = "<a>".startswith(text.lstrip())
        found = (text, None) if is_undecided else reference(text, stops, False)
        assert ("".join(shown), matched) == found


@given(chunks=st.lists(letters, max_size=6), stops=stop_lists, order=st.randoms())
def test_the_order_of_the_stops_does_not_matter(chunks, stops, order):
    shuffled = list(stops)
    order.shuffle(shuffled)
    assert run(StopChecker(stops, False), chunks) == run(
        StopChecker(tuple(shuffled), False), chunks
    )


@given(text=letters, stops=stop_lists, may_stop=st.booleans())
def test_what_is_held_back_is_the_longest_live_beginning_of_a_stop(text, stops, may_stop):
    checker = StopChecker(stops, False)
    certain, matched = checker.add(text, may_stop=may_stop)
    if matched is None:
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
        held = max((b for b in beginnings if text.endswith(b)), key=len)
        assert certain == text[: len(text) - len(held)]
        assert checker.flush() == held


@given(early=letters, late=letters, stops=stop_lists, include=st.booleans())
def test_a_match_that_ends_before_it_may_stop_does_not_count(early, late, stops, include):
    shown, matched = run(StopChecker(stops, include), [early, late], [False, True])
    want = reference(early + late, stops, include, first_end=len(early))
    # What was shown while no stop counted cannot be taken back.
    already = len(shown[0])
    assert matched == want[1]
    assert "".join(shown)[already:] == want[0][already:]


@pytest.mark.parametrize(
    ("chunks", "stop", "shown"),
    [
        (["Hello", " world"], "zz", ["Hello", " world", ""]),
        (["He", "ll", "o!"], "llx", ["He", "", "llo!", ""]),
        (["a", "a", "a", "b"], "aab", ["", "", "a", ""]),
        (["one\n", "\ntwo"], "\n\n", ["one", ""]),
        (["x", "END"], "END", ["x", ""]),
    ],
)
def test_examples(chunks, stop, shown):
    assert run(StopChecker((stop,), False), chunks)[0] == shown


def test_include_stop_ends_the_text_behind_it():
    assert run(StopChecker(("END",), True), ["x E", "ND y"]) == (["x ", "END"], "END")


def test_requests_do_not_share_state():
    one, two = StopChecker(("ab",), False), StopChecker(("ab",), False)
    assert one.add("a") == ("", None)
    assert two.add("b") == ("b", None)
    assert one.add("b") == ("", "ab")
