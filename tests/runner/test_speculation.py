"""Drafts change when tokens come, never which: the same answers with and without speculation."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from streamserve.config import SpeculativeConfig
from streamserve.core.plan import ModelRunner
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.speculation import Propose
from tests.runner.loop import BLOCK_SIZE, NUM_BLOCKS, Loop, forget
from tests.runner.tiny_llama import VOCAB, memory_for, runner_of, tiny_llama

pytestmark = pytest.mark.usefixtures("forget_requests")

MAX_SEQS = 8
MAX_TOKENS = 48
MAX_DRAFTS = 5
NUM_HOST_BLOCKS = 80
EOS = 7


@pytest.fixture(scope="module", params=["naive", "cpu", "naive on a device"])
def runner(request, tmp_path_factory) -> Iterator[ModelRunner]:
    backend, _, on_device = request.param.partition(" ")
    model = tiny_llama(tmp_path_factory.mktemp("model"), backend=backend)
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_SEQS)
    runner = runner_of(
        model,
        memory,
        MAX_TOKENS,
        NUM_HOST_BLOCKS,
        on_device=bool(on_device),
        num_drafts=MAX_DRAFTS,
    )
    yield runner
    runner.close()


def lookup(num_drafts: int) -> SpeculativeConfig:
    return SpeculativeConfig(
        num_speculative_tokens=num_drafts, prompt_lookup_min=1, prompt_lookup_max=3
    )


def known_answers(requests: list[Request], rng: random.Random, accuracy: float) -> Propose:
    """Drafts from answers that were given before, some of them spoilt."""
    answers = {request.request_id: list(request.token_ids) for request in requests}

    def propose(request: Request, max_tokens: int) -> list[int]:
        known = request.num_tokens
        drafts = answers[request.request_id][known : known + max_tokens]
        return [t if rng.random() < accuracy else rng.randrange(VOCAB) for t in drafts]

    return propose


def random_params(rng: random.Random) -> SamplingParams:
    """Every field that looks at a position or at what was generated before it."""
    max_tokens = rng.randint(1, 30)
    plain = rng.random() < 0.3
    return SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.7, 1.2]),
        max_tokens=max_tokens,
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]),
        min_tokens=0 if plain else rng.randint(0, max_tokens),
        presence_penalty=0.0 if plain else rng.choice([0.0, 0.5]),
        frequency_penalty=0.0 if plain else rng.choice([0.0, 0.4]),
        repetition_penalty=1.0 if plain else rng.choice([1.0, 1.3]),
        logit_bias={} if plain else rng.choice([{}, {3: 2.0, EOS: 4.0}]),
        stop_token_ids=rng.choice([(), (3, 5, 11)]),
        logprobs=rng.choice([None, None, 0, 4]),
        ignore_eos=rng.random() < 0.3,
    )


def random_requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 9, 40]))]
    requests = []
    for i in range(rng.randint(1, 10)):
        prompt = shared + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
        requests.append(
            Request(
                f"r{i}",
                prompt,
                random_params(rng),
                arrival_time=0.0,
                seed=seed * 100 + i,
                eos_token_ids=frozenset({EOS}),
            )
        )
    return requests


def random_options(rng: random.Random) -> dict:
    """Of a `Loop`: little memory or enough, small steps or large ones."""
    return {
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": rng.choice([9, 16, MAX_TOKENS]),
        "num_blocks": rng.choice([34, 60, NUM_BLOCKS]),  # 34: they preempt each other
        "prefix": rng.random() < 0.7,
        "max_steps_in_flight": rng.choice([1, 2]),
    }


def summary(loop: Loop, requests: list[Request]):
    """Tokens, ends, and logprobs, rounded so that another order of summation may be another."""
    logprobs: dict[str, list] = {request.request_id: [] for request in requests}
    for update in loop.updates:
        logprobs[update.request.request_id] += [
            (entry.token_id, pytest.approx(entry.logprob, abs=1e-3), len(entry.top))
            for entry in update.logprobs
        ]
    return [
        (r.output_token_ids, r.finish_reason, r.stop_reason, logprobs[r.request_id])
        for r in requests
    ]


@pytest.mark.parametrize("seed", range(10))
def test_random_requests_get_the_same_answers(runner, seed):
    rng = random.Random(seed)
    options = random_options(rng)
    if options["prefix"]:
        options["num_host_blocks"] = rng.choice([0, NUM_HOST_BLOCKS])
    loop, plain = Loop(runner, **options), random_requests(seed)
    loop.run(plain)
    expected = summary(loop, plain)
    forget(runner)
    for propose in (None, known_answers(plain, rng, 0.8), known_answers(plain, rng, 1.0)):
        speculative = lookup(rng.choice([1, 3, MAX_DRAFTS]))
        loop = Loop(runner, **options, speculative=speculative, propose=propose)
        drafted = random_requests(seed)
        loop.run(drafted)
        assert summary(loop, drafted) == expected
        stats = loop.scheduler.speculation_stats
        assert stats.num_accepted_tokens <= stats.num_draft_tokens
        forget(runner)


def test_right_drafts_save_steps_and_wrong_ones_cost_none(runner):
    params = SamplingParams(temperature=0.0, max_tokens=24)

    def request() -> Request:
        return Request("r", [5, 9, 13], params, arrival_time=0.0, seed=1)

    plain = request()
    Loop(runner).run([plain])
    forget(runner)
    for accuracy, num_steps in ((1.0, 5), (0.0, 24)):
        propose = known_answers([plain], random.Random(1), accuracy)
        loop = Loop(runner, speculative=lookup(5), propose=propose)
        drafted = request()
        assert loop.run([drafted]) == [plain.output_token_ids]
        assert drafted.finish_reason is FinishReason.LENGTH
        assert len(loop.updates) == num_steps
        forget(runner)
    stats = loop.scheduler.speculation_stats
    assert stats.num_drafts == 22  # not behind the prompt, and not for the last token


def test_text_that_repeats_is_drafted_from_itself(runner):
    """A bias makes the model repeat: from then on the lookup is always right."""
    params = SamplingParams(temperature=0.0, max_tokens=40, logit_bias={4: 100.0})
    loop = Loop(runner, speculative=lookup(5))
    drafted = Request("r", [5, 9, 13], params, arrival_time=0.0, seed=1)
    assert loop.run([drafted]) == [[4] * 40]
    assert len(loop.updates) < 12
