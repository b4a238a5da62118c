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
    ladder = StepLadder(max_tokens, max_seqs, num_adapters=num_adapters)
    seats = min(max_tokens, max_seqs)
    num_seqs = data.draw(st.integers(1, seats))
    num_tokens = data.draw(st.integers(num_seqs, max_tokens))
    has_groups = data.draw(st.booleans()) and num_seqs > 1
    has_adapters = data.draw(st.booleans())
    key = ladder.key(num_tokens, num_seqs, has_groups=has_groups, has_adapters=has_adapters)
    assert key in [*ladder.decodes(), *ladder.mixed()]
    assert key.num_seqs >= num_seqs
    assert key.num_tokens >= num_tokens
    assert key.is_decode == (num_tokens == num_seqs)
    assert key.has_groups == has_groups
    assert key.num_adapters == (num_adapters if has_adapters else 0)
    assert ladder.largest.num_adapters == num_adapters
    # Rows of logits are told from tokens by their number.
    assert key.is_decode == (key.num_tokens == key.num_seqs)
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


@pytest.mark.parametrize("chosen", [(), (3,), (1, 5, 400)])
def test_chosen_decode_sizes_reach_the_largest_batch(chosen):
    ladder = StepLadder(512, 40, decode_sizes=chosen)
    assert ladder.decode_sizes == (*(n for n in chosen if n < 40), 40)
    assert ladder.key(2, 2).num_seqs == next(n for n in ladder.decode_sizes if n >= 2)
