"""Drafts by a model: the answers stay the same, and those of the model itself are right."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from streamserve.config import SpeculativeConfig
from streamserve.core.plan import ModelRunner
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.build import build_runner
from streamserve.runner.drafting import DraftingRunner
from streamserve.runner.model_drafter import ModelDrafter
from tests.runner.loop import BLOCK_SIZE, NUM_BLOCKS, Loop, forget
from tests.runner.test_speculation import (
    MAX_SEQS,
    MAX_TOKENS,
    random_options,
    random_requests,
    summary,
)
from tests.runner.tiny_llama import VOCAB, memory_for, tiny_llama

MAX_DRAFTS = 4
ROWS = MAX_SEQS * (1 + MAX_DRAFTS)


@pytest.fixture(scope="module", params=["naive", "cpu"])
def runners(request, tmp_path_factory) -> Iterator[list[ModelRunner]]:
    """A model, the same once more, and a smaller one that hardly ever guesses right."""
    made = []
    for i, changes in enumerate(({}, {}, {"num_hidden_layers": 1, "hidden_size": 32})):
        model = tiny_llama(tmp_path_factory.mktemp(f"model{i}"), backend=request.param, **changes)
        memory = memory_for(
            model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_SEQS
        )
        most = {"max_num_batched_tokens": MAX_TOKENS + ROWS, "max_num_sampled": ROWS}
        made.append(build_runner(model, memory, **most)[0])
    yield made
    for runner in made:
        runner.close()


def drafting(runners: list[ModelRunner], draft: int) -> DraftingRunner:
    """A runner that knows no request yet."""
    for runner in runners:
        forget(runner)
    drafter = ModelDrafter(
        runners[draft],
        block_size=BLOCK_SIZE,
        vocab_size=VOCAB,
        max_num_batched_tokens=MAX_TOKENS + ROWS,
    )
    return DraftingRunner(runners[0], drafter)


def by_a_model(num_drafts: int) -> SpeculativeConfig:
    return SpeculativeConfig(num_speculative_tokens=num_drafts, method="draft_model", model="small")


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_get_the_same_answers(runners, seed):
    rng = random.Random(seed)
    options = random_options(rng)
    forget(runners[0])
    loop, plain = Loop(runners[0], **options), random_requests(seed)
    loop.run(plain)
    expected = summary(loop, plain)
    num_compiled = runners[0].num_compilations
    for draft in (1, 2):
        loop = Loop(
            drafting(runners, draft), **options, speculative=by_a_model(rng.choice([1, MAX_DRAFTS]))
        )
        drafted = random_requests(seed)
        loop.run(drafted)
        assert summary(loop, drafted) == expected
        assert loop.runner.num_compilations == num_compiled
        for runner in runners:
            forget(runner)


@pytest.mark.parametrize(("draft", "num_steps"), [(1, 7), (2, 24)])
def test_right_guesses_save_steps_and_wrong_ones_cost_none(runners, draft, num_steps):
    params = SamplingParams(temperature=0.0, max_tokens=24)
    requests = [Request("r", [5, 9, 13], params, arrival_time=0.0, seed=1) for _ in range(2)]
    forget(runners[0])
    Loop(runners[0]).run(requests[:1])
    loop = Loop(drafting(runners, draft), speculative=by_a_model(MAX_DRAFTS))
    assert loop.run(requests[1:]) == [requests[0].output_token_ids]
    assert len(loop.updates) == num_steps
    stats = loop.scheduler.speculation_stats
    assert stats.num_draft_tokens > 10
    assert (stats.num_accepted_tokens == stats.num_draft_tokens) == (draft == 1)


def test_a_prefix_that_is_cached_is_the_draft_models_too(runners):
    """The second request computes one token of its prompt, and guesses behind all of it."""
    params = SamplingParams(temperature=0.0, max_tokens=16)
    rng = random.Random(3)
    prompt = [rng.randrange(VOCAB) for _ in range(41)]
    loop = Loop(drafting(runners, 1), speculative=by_a_model(MAX_DRAFTS))
    for i in range(2):
        request = Request(f"r{i}", prompt, params, arrival_time=0.0, seed=1)
        loop.run([request])
    assert request.num_cached_tokens == 40
    stats = loop.scheduler.speculation_stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 16
