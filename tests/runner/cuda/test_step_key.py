from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.runner.cuda.step_key import LARGEST_MIXED_GRAPH, StepLadder

limits = st.tuples(st.integers(1, 9000), st.integers(1, 300))


@given(limits, st.data())
def test_every_step_fits_a_shape_that_warm_up_has_met(limits, data):
    max_tokens, max_seqs = limits
    num_adapters = data.draw(st.sampled_from([0, 4]))
    num_drafts = data.draw(st.sampled_from([0, 1, 5]))
    max_sampled = data.draw(st.integers(max_seqs, max_seqs + 64)) if num_drafts else max_seqs
    ladder = StepLadder(
        max_tokens,
        max_seqs,
        num_adapters=num_adapters,
        num_drafts=num_drafts,
        max_num_sampled=max_sampled,
    )
    seats = min(max_tokens, max_seqs)
    num_seqs = data.draw(st.integers(1, seats))
    num_tokens = data.draw(st.integers(num_seqs, max_tokens))
    most = min(num_tokens, max_sampled, num_seqs * (1 + num_drafts))
    num_sampled = data.draw(st.integers(0, most))
    has_groups = data.draw(st.booleans()) and num_seqs > 1
    has_adapters = data.draw(st.booleans())
    key = ladder.key(
        num_tokens,
        num_seqs,
        num_sampled=num_sampled,
        has_groups=has_groups,
        has_adapters=has_adapters,
    )
    assert key in list(ladder.shapes())
    assert key.num_seqs >= max(num_seqs, num_sampled)
    assert key.num_tokens >= num_tokens
    assert key.is_decode == (num_tokens == num_seqs)
    if not key.is_decode:
        is_drafted = num_drafts > 0 and num_sampled == num_tokens
        assert key.has_all_logits == is_drafted
        longest = min(1 + num_drafts, num_tokens) if is_drafted else num_tokens
        assert key.max_query_len >= longest
    assert key.has_groups == has_groups
    assert key.num_adapters == (num_adapters if has_adapters else 0)
    assert ladder.largest.num_adapters == num_adapters
    largest = ladder.largest
    assert largest.num_tokens >= key.num_tokens
    assert largest.num_seqs >= key.num_seqs


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_padding_is_bounded(num_tokens, max_tokens):
    key = StepLadder(max(max_tokens, num_tokens), 16).key(num_tokens, 1)
    assert key.num_tokens - num_tokens <= max(63, num_tokens // 2)


def test_a_decode_is_padded_little():
    ladder = StepLadder(8192, 256)
    sizes = [ladder.key(n, n).num_seqs for n in range(1, 257)]
    assert sizes == sorted(sizes)
    assert all(size - n <= max(7, n // 4) for n, size in enumerate(sizes, 1))
    assert len(ladder.decode_sizes) <= 24


def test_graphs_come_smallest_decodes_first():
    graphs = list(StepLadder(8192, 256).graphs())
    assert graphs[0].num_seqs == 1
    assert graphs[0].is_decode
    kinds = [key.is_decode for key in graphs]
    assert kinds == sorted(kinds, reverse=True)
    assert all(key.num_tokens <= LARGEST_MIXED_GRAPH for key in graphs)
    assert len(graphs) == len(set(graphs))


def test_drafts_need_few_shapes_and_no_other_products():
    plain = StepLadder(8192, 256)
    ladder = StepLadder(8192, 256, num_drafts=5, max_num_sampled=256)
    assert list(plain.drafting()) == []
    assert set(plain.shapes()) < set(ladder.shapes())
    sizes = {key.num_tokens for key in ladder.drafting()}
    assert len(sizes) <= 10
    assert sizes < {key.num_tokens for key in plain.graphs()}
    found = [ladder.key(n, 1 + n // 6, num_sampled=n) for n in range(3, 257)]
    assert all(key.num_tokens <= max(4, 2 * n - 2) for n, key in enumerate(found, 3))
    assert {key.max_query_len for key in found} == {4, 6}
    few = StepLadder(512, 4, num_drafts=5, max_num_sampled=24)
    assert [key.num_tokens for key in few.drafting()][::2] == [4, 8, 16, 24]
    assert few.largest.num_seqs == 24


@pytest.mark.parametrize("chosen", [(), (3,), (1, 5, 400)])
def test_chosen_decode_sizes_reach_the_largest_batch(chosen):
    ladder = StepLadder(512, 40, decode_sizes=chosen)
    assert ladder.decode_sizes == (*(n for n in chosen if n < 40), 40)
    assert ladder.key(2, 2).num_seqs == next(n for n in ladder.decode_sizes if n >= 2)
