from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.logits_edits import unpack_mask
from streamserve.runner.sampler import Sampler, inverse_cdf, top_ids
from streamserve_kernels import load_row_draws
from streamserve_kernels.native.library import runnable_builds, why_not
from tests.native_builds import native_build
from tests.runner.helpers import batch_of, reachable

transformers.logging.set_verbosity_error()

VOCAB = 1003  # not a multiple of anything
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=VOCAB + 5),
    SamplingParams(top_p=0.1),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.9999),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.5, min_p=0.02),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.7, temperature=0.0),
    SamplingParams(temperature=0.9, repetition_penalty=1.1, top_p=0.8, min_p=0.01),
]


@pytest.fixture(scope="module", params=["numpy", *runnable_builds()])
def sampler_of(request) -> Iterator[Callable[[int, int], Sampler]]:
    """Makes samplers: numpy's, and those of the native builds that this CPU runs."""
    if request.param == "numpy":
        yield Sampler
        return
    with native_build(request.param):
        if (reason := why_not()) is not None:
            pytest.skip(reason)
        yield lambda vocab_size, rows: Sampler(vocab_size, rows, load_row_draws(vocab_size))


def random_logits(rows: int, vocab_size: int = VOCAB, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((rows, vocab_size))).astype(np.float32)


def transformers_probabilities(
    logits: np.ndarray, params: SamplingParams, history: list[int]
) -> np.ndarray:
    """transformers' processors in vLLM's order."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature not in {0.0, 1.0}:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    scores = processors(torch.tensor([history]), torch.from_numpy(logits[None].copy()))[0]
    if params.temperature == 0.0:
        return torch.nn.functional.one_hot(scores.argmax(), len(logits)).double().numpy()
    return torch.softmax(scores.double(), dim=-1).numpy()


def reference_draw(probabilities: np.ndarray, uniform: float) -> int:
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: str(PARAMS.index(p)))
def test_the_distribution_is_that_of_transformers(sampler_of, params):
    history = [3, 4, 5, 400, 5]
    sampler = sampler_of(VOCAB, 300)
    draws = (np.arange(300) + 0.5) / 300
    for seed in range(4):
        logits = random_logits(1, seed=seed)
        expected = transformers_probabilities(logits[0], params, history)
        batch = batch_of(
            [params] * 300,
            VOCAB,
            draws=draws,
            histories=dict.fromkeys(range(300), (history[:2], history[2:])),
        )
        found = sampler.sample(np.repeat(logits, 300, axis=0), batch)
        # At a boundary of the CDF the last bits decide: accept what lies within 1e-6 of the draw.
        low = [reference_draw(expected, u - 1e-6) for u in draws]
        high = [reference_draw(expected, u + 1e-6) for u in draws]
        assert (found >= low).all()
        assert (found <= high).all()
        assert (expected[found] > 0).all()
        assert np.mean(np.array(low) == high) > 0.99


def test_inverse_cdf_is_exact_where_weights_are():
    rng = np.random.default_rng(1)
    rows, width = 40, 1024
    # Multiples of 2^-10: every sum is exact in float32.
    weights = rng.integers(0, 8, size=(rows, width)).astype(np.float32) / 1024
    weights[:, rng.integers(0, width, size=500)] = 0.0
    weights[3] = 0.0
    weights[3, 700] = 1.0
    cumulative = np.cumsum(weights.reshape(rows, -1, 256).sum(axis=2).astype(np.float64), axis=1)
    totals = weights.sum(axis=1, dtype=np.float64)
    everyone = np.arange(rows)
    draws = [0.0, 0.25, 0.5, 1 - 2.0**-53, *rng.random(200)]
    # The boundaries themselves: the token whose interval starts there is the one.
    draws += (np.cumsum(weights[0], dtype=np.float64)[::37] / totals[0]).tolist()
    for draw in draws:
        if draw >= 1.0:
            continue
        found = inverse_cdf(weights, cumulative, everyone, np.full(rows, draw))
        for row in range(rows):
            full = np.cumsum(weights[row], dtype=np.float64)
            # The target may round up to the total; the last token with weight has it then.
            target = min(draw * totals[row], np.nextafter(totals[row], 0))
            assert found[row] == np.searchsorted(full, target, side="right")
            assert weights[row, found[row]] > 0


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.5, 0.25, 0.125, 0.125]),
        (SamplingParams(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(top_k=3), [0.5, 0.25, 0.125, 0.125]),  # both that tie at the edge
        (SamplingParams(top_p=0.5), [1, 0, 0, 0]),
        (SamplingParams(top_p=0.51), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(top_p=0.8), [4 / 7, 2 / 7, 1 / 7, 0]),  # of a tie the lowest id
        (SamplingParams(min_p=0.5), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(temperature=0.5), [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        (SamplingParams(presence_penalty=math.log(2)), [1 / 3, 1 / 3, 1 / 6, 1 / 6]),
        (SamplingParams(logit_bias={0: -100.0}), [0, 0.5, 0.25, 0.25]),
        (SamplingParams(top_k=2, top_p=0.6), [1, 0, 0, 0]),
        (SamplingParams(min_p=0.5, top_p=0.6), [1, 0, 0, 0]),  # top-p sees what min-p left
    ],
)
def test_exact_distributions(sampler_of, params, expected):
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    sampler = sampler_of(4, 64)
    draws = (np.arange(1000) + 0.5) / 1000
    batch = batch_of(
        [params] * 1000, 4, draws=draws, histories=dict.fromkeys(range(1000), ([2], [0]))
    )
    found = sampler_of(4, 1000).sample(np.repeat(logits[None], 1000, axis=0), batch)
    counts = np.bincount(found, minlength=4)
    assert np.abs(counts - 1000 * np.array(expected)).max() <= 1
    assert (counts[np.array(expected) == 0] == 0).all()
    assert sampler.greedy(logits[None]).tolist() == [0]


def test_chi_square_of_seeded_draws(sampler_of):
    # One request's stream of 20,000 positions follows the distribution it was asked for.
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.03, 0.01])
    logits = np.log(probabilities).astype(np.float32)
    count = 20_000
    sampler = sampler_of(6, count)
    batch = batch_of([SamplingParams()] * count, 6, seeds=[7] * count, positions=range(count))
    found = np.bincount(sampler.sample(np.repeat(logits[None], count, axis=0), batch), minlength=6)
    chi_square = ((found - count * probabilities) ** 2 / (count * probabilities)).sum()
    assert chi_square < 20.5  # the 0.1% point of five degrees of freedom; the seed is fixed


@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 5000, 151_936])
def test_the_same_token_alone_and_in_any_company(sampler_of, vocab_size):
    rng = np.random.default_rng(vocab_size)
    count = 24
    logits = random_logits(count, vocab_size, seed=2)
    params = [PARAMS[i % len(PARAMS)] for i in range(count)]
    histories = {
        i: (rng.integers(0, vocab_size, 9).tolist(), rng.integers(0, vocab_size, 5).tolist())
        for i in range(count)
    }
    sampler = sampler_of(vocab_size, 64)

    def draw(rows: list[int]) -> list[int]:
        batch = batch_of(
            [params[i] for i in rows],
            vocab_size,
            seeds=[100 + i for i in rows],
            positions=[3 * i for i in rows],
            histories={j: histories[i] for j, i in enumerate(rows)},
        )
        return sampler.sample(logits[rows], batch).tolist()

    together = draw(list(range(count)))
    assert [draw([i])[0] for i in range(count)] == together
    for size in (2, 7, 13):
        rows = rng.permutation(count)[:size].tolist()
        assert draw(rows) == [together[i] for i in rows]


def test_top_p_of_nearly_flat_logits(sampler_of):
    logits = (0.01 * random_logits(1, 5000)).astype(np.float32)
    params = SamplingParams(top_p=0.6)
    found = reachable(sampler_of(5000, 256), logits[0], params)
    expected = transformers_probabilities(logits[0], params, [0])
    assert (expected[found > 0] > 0).all()


def test_min_tokens_bans_every_end_until_then(sampler_of):
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(2, 999), max_tokens=9)
    logits = np.array([[0.0, 9.0, 8.0, 7.0]], dtype=np.float32)
    sampler = sampler_of(4, 1)

    def at(position: int) -> int:
        return sampler.sample(logits, batch_of([params], 4, positions=[position], eos=[1]))[0]

    assert [at(p) for p in (0, 1, 2, 3)] == [3, 3, 3, 1]


def test_no_bias_lets_an_end_through_before_min_tokens(sampler_of):
    params = SamplingParams(temperature=0.0, min_tokens=1, logit_bias={1: 100.0})
    logits = np.zeros((1, 4), dtype=np.float32)
    sampler = sampler_of(4, 1)
    assert sampler.sample(logits, batch_of([params], 4, eos=[1]))[0] == 0
    assert sampler.sample(logits, batch_of([params], 4, positions=[1], eos=[1]))[0] == 1


def test_masks_allow_and_forbid(sampler_of):
    allowed = {5, 8, 700}
    bits = np.zeros(VOCAB, dtype=np.uint8)
    bits[list(allowed)] = 1
    mask = np.packbits(bits, bitorder="little").tobytes()
    assert np.flatnonzero(unpack_mask(mask, VOCAB)).tolist() == sorted(allowed)
    logits = random_logits(20)
    params = [SamplingParams(temperature=2.0), SamplingParams(temperature=0.0)] * 10
    found = sampler_of(VOCAB, 64).sample(
        logits, batch_of(params, VOCAB, masks={i: mask for i in range(0, 20, 1) if i != 7})
    )
    assert {int(token) for i, token in enumerate(found) if i != 7} <= allowed
    assert found[7] == logits[7].argmax()


def test_a_short_mask_forbids_what_it_does_not_reach():
    assert unpack_mask(b"\xff", 12).tolist() == [True] * 8 + [False] * 4
    assert unpack_mask(b"\xff\xff\xff", 12).tolist() == [True] * 12


def test_logprobs_are_log_softmax_of_the_raw_logits(sampler_of):
    logits = random_logits(6, 5000)
    params = [SamplingParams(temperature=0.5, logprobs=n) for n in (0, 1, 5, 20)]
    params += [SamplingParams(logit_bias={3: 50.0}, logprobs=2), SamplingParams()]
    batch = batch_of(params, 5000)
    sampler = sampler_of(5000, 8)
    ids = sampler.sample(logits, batch)
    found = sampler.logprobs(logits, ids, batch.num_logprobs)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
    assert found[5] == []
    for row, count in enumerate((0, 1, 5, 20, 2)):
        (entry,) = found[row]
        assert entry.token_id == ids[row]
        assert entry.logprob == pytest.approx(expected[row, ids[row]].item(), abs=1e-5)
        values, tokens = expected[row].topk(count)
        assert [token for token, _ in entry.top] == tokens.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert ids[4] == 3  # chosen by its bias, reported without it


def test_logprobs_are_finite_whatever_the_model_says(sampler_of):
    logits = np.zeros((3, 10), dtype=np.float32)
    logits[0, 3:] = -np.inf
    logits[1, 2] = np.nan
    logits[2] = -np.inf
    ids = np.array([5, 2, 0])
    for row in sampler_of(10, 4).logprobs(logits, ids, np.array([10, 10, 10])):
        (entry,) = row
        assert math.isfinite(entry.logprob)
        assert all(math.isfinite(value) for _, value in entry.top)


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: str(PARAMS.index(p)))
def test_bad_rows_yield_ids_and_leave_their_neighbours_alone(sampler_of, params):
    logits = random_logits(8)
    clean = logits.copy()
    logits[1] = np.nan
    logits[2, 17] = np.nan
    logits[3] = -np.inf
    logits[4, 30] = np.inf
    logits[5] = -np.inf
    logits[5, 77] = -3.0
    logits[6, :] = np.float32(3e38)
    sampler = sampler_of(VOCAB, 8)
    histories = dict.fromkeys(range(8), ([5], [6, 30]))
    found = sampler.sample(logits, batch_of([params] * 8, VOCAB, histories=histories))
    expected = sampler.sample(clean, batch_of([params] * 8, VOCAB, histories=histories))
    assert ((found >= 0) & (found < VOCAB)).all()
    assert found[[0, 7]].tolist() == expected[[0, 7]].tolist()
    assert found[2] != 17
    assert found[4] == 30
    assert found[5] == 77


def test_greedy_ignores_nan_and_takes_the_lowest_of_a_tie(sampler_of):
    logits = np.array([[1, 3, 3, np.nan], [-np.inf] * 4, [0, 0, np.inf, 0]], dtype=np.float32)
    assert sampler_of(4, 4).greedy(logits).tolist() == [1, 0, 2]


def test_all_forbidden_falls_back_to_the_raw_arg_max(sampler_of):
    logits = random_logits(2)
    found = sampler_of(VOCAB, 4).sample(
        logits, batch_of([SamplingParams()] * 2, VOCAB, masks={0: b"\0", 1: b"\0"})
    )
    assert found.tolist() == logits.argmax(axis=1).tolist()


def test_tiny_temperatures_are_greedy(sampler_of):
    logits = random_logits(3)
    params = [SamplingParams(temperature=t) for t in (1e-38, 1e-6, 1e-4)]
    found = sampler_of(VOCAB, 4).sample(logits, batch_of(params, VOCAB, draws=[0.99] * 3))
    assert found.tolist() == logits.argmax(axis=1).tolist()


def test_the_raw_logits_stay_as_they_are(sampler_of):
    logits = random_logits(5)
    before = logits.copy()
    params = [PARAMS[i] for i in (1, 8, 13, 14, 16)]
    sampler_of(VOCAB, 3).sample(logits, batch_of(params, VOCAB, masks={0: b"\xff" * 200}))
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("breaks", [False, True])
def test_the_raw_logits_come_back_whatever_was_changed_in_them(sampler_of, monkeypatch, breaks):
    logits = random_logits(3)
    before = logits.copy()
    params = [
        SamplingParams(repetition_penalty=1.3, bad_words=("a", "b"), bad_word_ids=((9,), (2, 8))),
        SamplingParams(
            presence_penalty=1.0, logit_bias={5: 3.0, 6: -3.0}, allowed_token_ids=(5, 6)
        ),
        SamplingParams(frequency_penalty=0.5, min_tokens=2, stop_token_ids=(30, 31), max_tokens=3),
    ]
    batch = batch_of(params, VOCAB, histories=dict.fromkeys(range(3), ([7, 2], [40, 40, 2])))
    batch.drafts.update({0: [11, 12], 1: [11], 2: [12, VOCAB + 4]})
    sampler = sampler_of(VOCAB, 3)
    if breaks and sampler._draws is not None:
        monkeypatch.setattr(sampler._draws, "draw", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sampler.sample(logits, batch)
    else:
        sampler.sample(logits, batch)
    assert np.array_equal(logits, before)


def test_edits_masks_and_drafts_together_are_numpys(sampler_of):
    """Penalties count drafts; a grammar and a list of allowed tokens forbid what either does."""
    logits = 0.2 * random_logits(64)
    bits = np.random.default_rng(3).integers(0, 2, VOCAB, dtype=np.uint8)
    grammar = np.packbits(bits, bitorder="little").tobytes()
    allowed = tuple(range(0, VOCAB, 3))
    params = [
        SamplingParams(
            temperature=0.0 if i % 4 == 0 else 0.9,
            presence_penalty=1.0,
            frequency_penalty=0.4,
            logit_bias={6: 4.0},
            allowed_token_ids=allowed if i % 2 else None,
        )
        for i in range(64)
    ]
    batch = batch_of(
        params,
        VOCAB,
        histories=dict.fromkeys(range(64), ([3], [*range(30)])),
        masks={i: grammar[: 100 if i % 3 else None] for i in range(0, 64, 2)},
    )
    batch.drafts.update({i: [6, 6, 600] for i in range(0, 64, 5)})
    found = sampler_of(VOCAB, 64).sample(logits, batch)
    assert found.tolist() == Sampler(VOCAB, 64).sample(logits, batch).tolist()
    for row, token in enumerate(found.tolist()):
        assert row % 2 == 0 or token in allowed
        assert row % 2 or bits[token]


def test_many_logprobs_and_some_that_nothing_can_be_told_of(sampler_of):
    logits = random_logits(4, 40_000)
    logits[1] = np.nan
    logits[2, :39_000] = -np.inf
    logits[2, 39_500] = np.nan
    wanted = np.array([300, 5, 20, -1])
    ids = np.array([7, 8, 9, 10])
    found = sampler_of(40_000, 4).logprobs(logits, ids, wanted)
    expected = Sampler(40_000, 4).logprobs(logits, ids, wanted)
    assert [len(row) for row in found] == [1, 1, 1, 0]
    for (ours,), (theirs,) in zip(found[:3], expected[:3], strict=True):
        assert ours.token_id == theirs.token_id
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx(
            [v for _, v in theirs.top], abs=1e-5
        )
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_top_ids_break_ties_by_id():
    values = np.array([1, 5, 5, 0, 5, 2], dtype=np.float32)
    assert top_ids(values, 2).tolist() == [1, 2]
    assert top_ids(values, 5).tolist() == [1, 2, 4, 5, 0]
    assert top_ids(values, 99).tolist() == [1, 2, 4, 5, 0, 3]
    assert top_ids(values, 0).tolist() == []
