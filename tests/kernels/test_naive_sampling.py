from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.logits_edits import TokenCounts, unpack_mask
from streamserve.runner.sampler import Sampler
from streamserve_kernels import naive_sampling
from streamserve_kernels.sampling import IN_PROMPT, MIN_LOGPROB, pack_mask, set_tokens
from tests.kernels.sampling_cases import (
    Case,
    bad_case,
    check,
    drafted_case,
    drafted_counts,
    edited_case,
    plain_case,
    ragged_cases,
    random_rows,
    tied_case,
    uniforms,
)

VOCAB = 1003


@pytest.mark.parametrize("scale", [8.0, 4.0, 1.0, 0.05])
def test_draws_are_those_of_the_runners_sampler(scale):
    for seed in range(20):
        check(naive_sampling, plain_case(VOCAB, seed, scale=scale), "cpu", edits=False)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ragged_cases([1, 2, 40, 256, 700], max_rows=4))
def test_any_wish_on_any_row(case):
    check(naive_sampling, case, "cpu", edits=False)


def test_equals_at_a_threshold():
    for seed in range(20):
        check(naive_sampling, tied_case(VOCAB, seed), "cpu", edits=False)


def test_edits():
    for seed in range(20):
        check(naive_sampling, edited_case(VOCAB, seed), "cpu", edits=True)


def test_drafts_are_history_to_the_rows_behind_them():
    for seed in range(20):
        case = drafted_case(VOCAB, seed)
        check(naive_sampling, case, "cpu", edits=True)
        assert not torch.equal(case.expected(), replace(case, drafts={}).expected())


def test_samples_behind_a_wrong_draft_do_not_count():
    *given, expected = drafted_counts(VOCAB)
    naive_sampling.add_tokens(*given)
    assert torch.equal(given[0], expected)


def test_bad_rows():
    for seed in range(3):
        check(naive_sampling, bad_case(VOCAB, seed), "cpu", edits=True)


def test_the_ends_of_the_uniform():
    params = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=5)] * 2
    draws = [0.0] * 3 + [1.0 - 2.0**-53] * 3
    check(naive_sampling, Case(random_rows(6, VOCAB, seed=1), params, draws), "cpu", edits=False)


def test_greedy_takes_the_lowest_of_equals():
    logits = random_rows(4, VOCAB, seed=2).round()
    logits[1, ::2] = float("nan")
    logits[2] = float("-inf")
    logits[3] = float("nan")
    expected = Sampler(VOCAB, 4).greedy(logits.numpy())
    assert naive_sampling.greedy(logits).tolist() == expected.tolist()


def test_logprobs():
    logits = random_rows(4, VOCAB, seed=3)
    logits[1, ::2] = float("nan")
    logits[2] = float("-inf")
    logits[3, [5, 8]] = float("inf")
    ids = torch.tensor([4, 1, 0, 8])
    found = naive_sampling.logprobs(logits, ids, 5)
    expected = Sampler(VOCAB, 4).logprobs(
        logits.numpy(), ids.numpy(), np.full(4, 5, dtype=np.int64)
    )
    for row, (of_row,) in enumerate(expected):
        assert found.top_ids[row].tolist() == [token for token, _ in of_row.top]
        values = torch.tensor([of_row.logprob, *[value for _, value in of_row.top]])
        torch.testing.assert_close(torch.cat((found.chosen[row : row + 1], found.top[row])), values)
    assert found.top[2].tolist() == [0.0] + [MIN_LOGPROB] * 4
    assert naive_sampling.logprobs(logits, ids, 0).top_ids.shape == (4, 0)


def test_counts_are_those_of_the_runners_history():
    prompt, output = [5, 9, 9, VOCAB, -1], [9, 3, 3, VOCAB + 1]
    counts = torch.full((3, VOCAB), 77, dtype=torch.int32)
    set_tokens(counts, 1, torch.tensor(prompt), torch.tensor(output))
    naive_sampling.add_tokens(
        counts,
        torch.tensor([1, -1, 1], dtype=torch.int32),
        torch.tensor([3, 4, VOCAB]),
    )
    history = TokenCounts(prompt + output, len(prompt), VOCAB)
    history.extend(len(prompt) + len(output), [3])
    expected = torch.zeros(VOCAB, dtype=torch.int32)
    expected[torch.from_numpy(history.ids)] = torch.from_numpy(history.counts).int()
    assert torch.equal(counts[1] & (IN_PROMPT - 1), expected)
    assert (counts[1] >= IN_PROMPT).nonzero()[:, 0].tolist() == [5, 9]
    assert (counts[[0, 2]] == 77).all()
    set_tokens(counts, 1, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    assert not counts[1].any()


@pytest.mark.parametrize("size", [1, 3, 4, 125, 126, 128, 200])
def test_packed_masks(size):
    mask = np.random.default_rng(size).bytes(size)
    words = pack_mask(mask, VOCAB)
    assert words.shape == (-(-VOCAB // 32),)
    bits = (words[:, None] >> torch.arange(32)) & 1
    allowed = bits.flatten()[:VOCAB].bool().numpy()
    np.testing.assert_array_equal(allowed, unpack_mask(mask, VOCAB))


def test_a_row_alone_draws_the_same():
    case = plain_case(VOCAB, 5)
    together = naive_sampling.sample(case.logits, case.tensors())
    for row in range(len(together)):
        tensors = type(case.tensors())(*(t[row : row + 1] for t in case.tensors()))
        assert naive_sampling.sample(case.logits[row : row + 1], tensors) == together[row]


def test_uniforms_may_be_float32():
    case = plain_case(VOCAB, 6)
    tensors = case.tensors()
    as_float = tensors._replace(uniforms=tensors.uniforms.float(), top_p=tensors.top_p.float())
    case.draws = as_float.uniforms.double().tolist()
    ids = naive_sampling.sample(case.logits, as_float)
    assert (ids == case.expected()).sum() >= len(ids) - 1
    assert uniforms(3, seed=1) != uniforms(3, seed=2)
