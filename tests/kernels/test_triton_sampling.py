from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from streamserve.core.sampling_params import SamplingParams
from streamserve_kernels import naive_sampling
from streamserve_kernels.sampling import SamplingTensors
from tests.kernels.pretended_gpu import capture
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

pytest.importorskip("triton")

from streamserve_kernels.triton import sampling
from streamserve_kernels.triton.runtime import INTERPRETED


@pytest.fixture
def vocab_size(device: torch.device) -> int:
    return 1003 if device.type == "cpu" else 128256


@pytest.mark.parametrize("scale", [8.0, 1.0, 0.05])
def test_draws_are_those_of_the_runners_sampler(device, vocab_size, scale):
    check(sampling, plain_case(vocab_size, 1, scale=scale), device, edits=False)


@pytest.mark.skipif(not INTERPRETED, reason="every vocabulary would be a compilation")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ragged_cases([1, 40, 256, 700], max_rows=2))
def test_any_wish_on_any_row(case):
    check(sampling, case, "cpu", edits=False)


def test_rows_too_flat_for_their_lists(device):
    params = [SamplingParams(top_p=0.9), SamplingParams(top_k=3000, top_p=0.7)]
    vocab_size = 5003 if device.type == "cpu" else 128256
    logits = random_rows(2, vocab_size, seed=3, scale=0.02)
    check(sampling, Case(logits, params, uniforms(2, seed=3)), device, edits=False)


def test_equals_at_a_threshold(device, vocab_size):
    check(sampling, tied_case(vocab_size, 2), device, edits=False)


def test_every_token_equal(device, vocab_size):
    params = [SamplingParams(), SamplingParams(top_p=0.25), SamplingParams(top_k=3)]
    logits = torch.full((3, vocab_size), -2.0)
    check(sampling, Case(logits, params, [0.999, 0.999, 0.5]), device, edits=False)


def test_edits(device, vocab_size):
    case = edited_case(vocab_size, 4)
    wide = torch.full((len(case.params), vocab_size + 5), float("nan"))
    wide[:, :vocab_size] = case.logits
    case.logits = wide[:, :vocab_size]
    check(sampling, case, device, edits=True)


@pytest.mark.parametrize("kind", [edited_case, drafted_case])
def test_edited_logits_are_those_of_the_twin(device, vocab_size, monkeypatch, kind):
    """Number by number: of most edits no draw tells."""
    case = kind(vocab_size, 14)
    if kind is edited_case:
        case.eos = (3, 7, vocab_size - 1, *range(90, 170))  # more bans than are read at once
    weigh_kernel, seen = sampling.sampling_kernels.weigh_kernel, []

    class Watched:
        def __getitem__(self, grid):
            def launch(source, *args, **options):
                seen.append(source.clone())
                weigh_kernel[grid](source, *args, **options)

            return launch

    monkeypatch.setattr(sampling.sampling_kernels, "weigh_kernel", Watched())
    sampling.sample(case.logits.to(device), case.tensors(device), case.edits(device))
    assert seen[0].cpu().equal(naive_sampling.edited(case.logits, case.edits()))


def test_a_uniform_on_an_edge_is_the_next_tokens(device, vocab_size):
    logits = torch.full((6, vocab_size), float("-inf"))
    logits[:, [5, 300, 301, 900]] = 0.0
    params = [SamplingParams(), SamplingParams(top_k=4)] * 3
    case = Case(logits, params, [0.25, 0.25, 0.5, 0.5, 0.75, 0.75])
    ids = sampling.sample(logits.to(device), case.tensors(device))
    assert ids.tolist() == [300, 300, 301, 301, 900, 900]


@pytest.mark.parametrize("scale", [4.0, 0.02])
def test_the_least_likely_that_stays_and_the_last(device, vocab_size, scale):
    """A token too many, or too few, shows nowhere as it does there."""
    params = [SamplingParams(top_k=k) for k in (2, 3, 5, 8, 13, 21, 34, 55, 89, 300, 900)]
    params += [SamplingParams(top_p=p) for p in (0.05, 0.3, 0.5, 0.7, 0.9, 0.99)]
    params += [SamplingParams(top_k=40, top_p=0.8), SamplingParams(top_k=20, min_p=0.01)]
    logits = random_rows(len(params), vocab_size, seed=15, scale=scale)
    case = Case(logits, params, [1.0 - 2.0**-53] * len(params))
    weights = naive_sampling.truncated_weights(logits, case.tensors()).double()
    least = torch.where(weights > 0.0, weights, torch.inf).argmin(1, keepdim=True)
    middle = (weights.cumsum(1) - weights / 2).gather(1, least) / weights.sum(1, keepdim=True)
    for draws in (case.draws, middle[:, 0].tolist()):
        case.draws = draws
        ids = check(sampling, case, device, edits=False)
        if device.type == "cpu":  # to the last bit: a GPU's powers are others
            assert ids.equal(naive_sampling.sample(logits, case.tensors()))


def test_bad_rows(device, vocab_size):
    check(sampling, bad_case(vocab_size, 5), device, edits=True)


def test_bad_rows_without_edits(device, vocab_size):
    case = bad_case(vocab_size, 6)
    case.masks = {}
    check(sampling, case, device, edits=False)


def test_the_ends_of_the_uniform(device, vocab_size):
    params = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=5)] * 2
    draws = [0.0] * 3 + [1.0 - 2.0**-53] * 3
    logits = random_rows(6, vocab_size, seed=7)
    check(sampling, Case(logits, params, draws), device, edits=False)


def test_a_row_alone_draws_the_same(device, vocab_size):
    case = plain_case(vocab_size, 8)
    tensors = case.tensors(device)
    logits = case.logits.to(device)
    together = sampling.sample(logits, tensors)
    for row in (1, 6, 9):
        alone = SamplingTensors(*(t[row : row + 1].clone() for t in tensors))
        assert sampling.sample(logits[row : row + 1], alone) == together[row]


def test_rows_of_another_type_at_a_stride(device, vocab_size):
    params = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=5, min_p=0.01)]
    wide = torch.full((3, vocab_size + 45), float("nan"), dtype=torch.bfloat16, device=device)
    logits = wide[:, :vocab_size]
    case = Case(random_rows(3, vocab_size, seed=9), params, uniforms(3, seed=9))
    logits.copy_(case.logits)
    ids = sampling.sample(logits, case.tensors(device))
    assert ids.tolist() == naive_sampling.sample(case.logits, case.tensors()).tolist()
    assert sampling.greedy(logits).tolist() == naive_sampling.greedy(case.logits).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_are_as_their_copy_in_float32(device, vocab_size, dtype):
    case = edited_case(vocab_size, 15)
    logits = case.logits.to(device, dtype)
    copy, tensors, edits = logits.float(), case.tensors(device), case.edits(device)
    assert torch.equal(sampling.greedy(logits), sampling.greedy(copy))
    for change in (None, edits):
        ids = sampling.sample(logits, tensors, change)
        assert torch.equal(ids, sampling.sample(copy, tensors, change))
    found, expected = (sampling.logprobs(rows, ids, 4) for rows in (logits, copy))
    for one, other in zip(found, expected, strict=True):
        # Threads hold other elements of 16 bits than of 32, and add them up in another order.
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)


def awkward_rows(vocab_size: int) -> Tensor:
    logits = random_rows(5, vocab_size, seed=10).round()
    logits[1, ::2] = float("nan")
    logits[2] = float("-inf")
    logits[3, [5, 800]] = float("inf")
    logits[4] = float("nan")
    return logits


def test_greedy_takes_the_lowest_of_equals(device, vocab_size):
    logits = awkward_rows(vocab_size)
    ids = sampling.greedy(logits.to(device))
    assert ids.dtype == torch.int64
    assert ids.tolist() == naive_sampling.greedy(logits).tolist()


@pytest.mark.parametrize("count", [0, 5])
def test_logprobs(device, vocab_size, count):
    logits = awkward_rows(vocab_size)
    ids = torch.tensor([vocab_size - 1, 1, 0, 800, 3])
    found = sampling.logprobs(logits.to(device), ids.to(device), count)
    expected = naive_sampling.logprobs(logits, ids, count)
    for ours, theirs in ((found.chosen, expected.chosen), (found.top, expected.top)):
        torch.testing.assert_close(ours.cpu(), theirs, atol=5e-6, rtol=1e-6)
    is_likely = expected.top > -9999.0
    assert found.top_ids.shape == (5, count)
    assert torch.equal(found.top_ids.cpu()[is_likely], expected.top_ids[is_likely])


def test_no_more_logprobs_than_tokens(device):
    logits, ids = torch.randn(2, 3), torch.tensor([2, 0])
    found = sampling.logprobs(logits.to(device), ids.to(device), 5)
    expected = naive_sampling.logprobs(logits, ids, 5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=5e-6, rtol=1e-6)


def test_counts(device, vocab_size):
    counts = torch.zeros(3, vocab_size, dtype=torch.int32)
    rows = torch.tensor([2, -1, 0, 2, 1], dtype=torch.int32)
    ids = torch.tensor([5, 6, vocab_size - 1, 5, vocab_size])
    on_device = counts.to(device, copy=True)
    sampling.add_tokens(on_device, rows.to(device), ids.to(device))
    naive_sampling.add_tokens(counts, rows, ids)
    assert counts.sum() == 3
    assert torch.equal(on_device.cpu(), counts)


def test_samples_behind_a_wrong_draft_do_not_count(device, vocab_size):
    *given, expected = drafted_counts(vocab_size, device)
    sampling.add_tokens(*given)
    assert torch.equal(given[0].cpu(), expected)


def test_the_work_space_is_told(device, vocab_size):
    assert 0 < sampling.work_bytes(1, vocab_size, edits=False) < 2**20
    with_edits = sampling.work_bytes(2, vocab_size, edits=True)
    assert with_edits == 2 * (sampling.work_bytes(1, vocab_size, edits=False) + 4 * vocab_size)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_of_a_models_size(rows, dtype):
    vocab_size = 128256
    one = plain_case(vocab_size, 11)
    params = (list(one.params) * 5)[-rows:]
    logits = random_rows(rows, vocab_size, seed=12).to(dtype)
    check(sampling, Case(logits, params, uniforms(rows, seed=12)), "cuda", edits=False)
    assert torch.equal(sampling.greedy(logits.cuda()).cpu(), naive_sampling.greedy(logits))


@pytest.mark.parametrize("kind", [edited_case, drafted_case])
def test_a_graph_draws_by_what_its_tensors_hold(device, vocab_size, kind):
    """Nothing that is launched depends on what rows ask for."""
    case = kind(vocab_size, 13)
    logits = case.logits.to(device)
    tensors, edits = case.tensors(device), case.edits(device)
    fixed_logits = torch.zeros_like(logits)
    fixed = SamplingTensors(*(torch.zeros_like(t) for t in tensors))
    fixed_edits = type(edits)(*(None if t is None else t.clone() for t in edits))
    sampling.sample(fixed_logits, fixed, fixed_edits)
    sampling.greedy(fixed_logits)
    replay, (ids, likeliest) = capture(
        lambda: (sampling.sample(fixed_logits, fixed, fixed_edits), sampling.greedy(fixed_logits))
    )
    fixed_logits.copy_(logits)
    for mine, theirs in zip(fixed, tensors, strict=True):
        mine.copy_(theirs)
    replay()
    assert torch.equal(ids, sampling.sample(logits, tensors, edits))
    assert torch.equal(likeliest, sampling.greedy(logits))
