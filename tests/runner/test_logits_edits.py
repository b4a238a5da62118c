from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.logits_edits import LogitsEdits, TokenCounts
from tests.runner.helpers import new_request

VOCAB = 50
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=30)


def direct(logits, params, prompt, output):
    """The formulas, token by token, in float64."""
    counts = Counter(output)
    result = []
    for token, logit in enumerate(logits.tolist()):
        value = logit
        if token in counts or token in prompt:
            factor = params.repetition_penalty
            value = value * factor if value < 0 else value / factor
        value -= params.frequency_penalty * counts[token]
        value -= params.presence_penalty * (counts[token] > 0)
        value += params.logit_bias.get(token, 0.0)
        result.append(value)
    return result


@settings(deadline=None, max_examples=60)
@given(
    prompt=tokens.filter(bool),
    output=tokens,
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    presence=st.sampled_from([0.0, -1.0, 2.0]),
    frequency=st.sampled_from([0.0, -0.5, 1.5]),
    seed=st.integers(0, 100),
)
def test_penalties_against_the_formula(prompt, output, repetition, presence, frequency, seed):
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={2: 1.5, 30: -4.0, VOCAB + 3: 9.0},
    )
    logits = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 5
    expected = direct(logits, params, prompt, output)
    # Known from the start, or learned one by one: the same.
    at_once = LogitsEdits(new_request(params, prompt=prompt, output=output), VOCAB)
    learned = LogitsEdits(new_request(params, prompt=prompt), VOCAB)
    if learned.history is not None:
        for i, token in enumerate(output):
            learned.history.extend(len(prompt) + i, [token])
    for edits in (at_once, learned):
        row = logits.copy()
        edits.apply(row, len(output))
        assert row.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_chunk_that_is_computed_again_is_not_counted_again():
    counts = TokenCounts([1, 2, 3, 7], 3, VOCAB)
    counts.extend(0, [1, 2, 3, 7])
    counts.extend(3, [7, 7])
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {
        1: 0.0,
        2: 0.0,
        3: 0.0,
        7: 2.0,
    }
    assert counts.num_tokens == 5


def test_many_distinct_tokens():
    counts = TokenCounts([0], 1, 10_000)
    counts.extend(1, list(range(5000)))
    assert counts.ids.tolist() == list(range(5000))
    assert counts.counts.tolist() == [1.0] * 5000


def test_ids_beyond_the_vocabulary_are_no_business_of_the_logits():
    params = SamplingParams(presence_penalty=1.0, logit_bias={60: 1.0}, min_tokens=2)
    request = new_request(params, prompt=[1, 70], output=[80, -1], eos=[90, 3])
    row = np.zeros(VOCAB, dtype=np.float32)
    LogitsEdits(request, VOCAB).apply(row, 0)
    assert np.flatnonzero(row).tolist() == [3]


def test_plain_requests_need_no_edits():
    assert not LogitsEdits.are_needed(new_request(SamplingParams(temperature=0.3, top_p=0.5)))
    for params in (
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(logit_bias={1: 1.0}),
        SamplingParams(min_tokens=1),
    ):
        assert LogitsEdits.are_needed(new_request(params))
