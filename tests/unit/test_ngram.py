"""Prompt lookup: which tokens are drafted, and how the index judges itself."""

import random

import pytest

from streamserve.core.ngram import NgramIndex


def index_of(token_ids: list[int], min_n: int = 2, max_n: int = 4) -> NgramIndex:
    index = NgramIndex(min_n, max_n)
    index.extend(token_ids, len(token_ids))
    return index


def naive_draft(token_ids: list[int], min_n: int, max_n: int, count: int) -> list[int]:
    """The latest of the places whose context agrees furthest with the end of the text."""
    best = (0, -1)
    for place in range(min_n, len(token_ids)):
        length = 0
        while (
            length < min(max_n, place)
            and token_ids[place - 1 - length] == token_ids[len(token_ids) - 1 - length]
        ):
            length += 1
        if length >= min_n:
            best = max(best, (length, place))
    if best[1] < 0:
        return []
    text = list(token_ids)
    for i in range(count):
        text.append(text[best[1] + i])
    return text[len(token_ids) :]


@pytest.mark.parametrize(
    ("token_ids", "drafts"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
        ([1, 2, 3], []),
        ([1, 2], []),
        ([7], []),
        ([], []),
        ([1, 2, 8, 1, 2, 9, 1, 2], [9, 1, 2, 9]),  # the latest
        ([5, 1, 2, 8, 6, 1, 2, 9, 5, 1, 2], [8, 6, 1, 2]),  # the longest
        ([3, 3, 3], [3, 3, 3, 3]),  # a draft goes on in itself
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),
    ],
)
def test_what_followed_the_last_time_is_drafted(token_ids, drafts):
    assert index_of(token_ids).draft(token_ids, 4) == drafts


@pytest.mark.parametrize("seed", range(60))
def test_any_text_gets_what_a_search_of_all_of_it_finds(seed):
    rng = random.Random(seed)
    min_n = rng.randint(1, 3)
    max_n = rng.randint(min_n, 5)
    token_ids = [rng.randrange(4) for _ in range(rng.randint(0, 24))]
    index = NgramIndex(min_n, max_n)
    while index.num_indexed < len(token_ids):  # in pieces
        index.extend(token_ids, min(index.num_indexed + rng.randint(1, 5), len(token_ids)))
    found = index.draft(token_ids, 5)
    expected = naive_draft(token_ids, min_n, max_n, 5)
    assert bool(found) == bool(expected)
    if len(token_ids) < 12:  # few enough that no candidate is passed over
        assert found == expected


def test_it_knows_how_good_its_drafts_would_have_been():
    rng = random.Random(1)
    noise = [rng.randrange(10**6) for _ in range(300)]
    index = index_of(noise)
    assert index.hit_rate < 0.01
    index.extend(noise * 2, 600)
    assert index.hit_rate > 0.95
    assert index.hit_rate_when_found > 0.95
    assert index.continue_rate > 0.95
    text = noise * 2 + [rng.randrange(10**6) for _ in range(100)]
    index.extend(text, 700)
    assert index.hit_rate < 0.05


def test_large_ids_are_told_apart():
    token_ids = [2**31, 1, 5, 0, 2**31 + 1, 7, 2**31, 1]
    assert index_of(token_ids).draft(token_ids, 1) == [5]
