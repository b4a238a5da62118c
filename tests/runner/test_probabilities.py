"""Prompt logprobs, bans and allowances through scheduler and runner, against transformers."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.cuda.model_runner import CudaModelRunner
from tests.runner.against_transformers import VOCAB, Pair, prompt_of
from tests.runner.test_end_to_end import Loop

_numbers = count()


def request_of(token_ids: list[int], eos=frozenset(), **params) -> Request:
    options = {"temperature": 0.0, "max_tokens": 4, **params}
    return Request(
        f"p{next(_numbers)}",
        token_ids,
        SamplingParams(**options),
        arrival_time=0.0,
        seed=0,
        eos_token_ids=eos,
    )


def check_prompt(pair: Pair, request: Request) -> None:
    prompt = request.token_ids[: request.num_prompt_tokens]
    theirs = pair.logprobs(prompt)
    found = request.prompt_logprobs
    assert [entry.token_id for entry in found] == prompt[1:]
    num_top = request.sampling_params.prompt_logprobs
    for row, entry in zip(theirs, found, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        best = row.topk(num_top)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        torch.testing.assert_close(
            torch.tensor([p for _, p in entry.top]), best.values, atol=2e-4, rtol=0
        )


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 48])
def test_prompt_logprobs_are_transformers(pair, runner, max_num_batched_tokens, steps_in_flight):
    """In chunks, beside requests that do not ask, and of prompts that are cached."""
    loop = Loop(
        runner,
        max_num_batched_tokens=max_num_batched_tokens,
        max_steps_in_flight=steps_in_flight,
    )
    prompts = [prompt_of(length, length) for length in (1, 2, 5, 17, 40)]
    for _ in range(2):
        asking = [request_of(prompt, prompt_logprobs=3) for prompt in prompts]
        others = [request_of(prompt) for prompt in prompts]
        loop.run([request for both in zip(asking, others, strict=True) for request in both])
        for request in asking:
            check_prompt(pair, request)
            assert request.num_cached_tokens == 0
        assert all(request.prompt_logprobs is None for request in others)
        assert [r.output_token_ids for r in asking] == [r.output_token_ids for r in others]
    assert sum(request.num_cached_tokens for request in others) > 20


def test_a_preempted_prompt_has_its_logprobs_once(pair, runner):
    loop = Loop(runner, num_blocks=26, max_num_batched_tokens=16)
    asking = [
        request_of(prompt_of(30, seed), prompt_logprobs=2, max_tokens=30) for seed in range(3)
    ]
    loop.run(asking)
    assert sum(request.num_preemptions for request in asking) > 0
    for request in asking:
        check_prompt(pair, request)


def test_logits_come_a_few_rows_at_a_time(pair, runner, monkeypatch):
    monkeypatch.setattr("streamserve.runner.prompt_logprobs._LOGITS_BYTES", 20 * 4 * VOCAB)
    sizes = []
    compute = pair.ours.compute_logits

    def counting(hidden_states, out=None):
        sizes.append(len(hidden_states))
        return compute(hidden_states, out)

    monkeypatch.setattr(pair.ours, "compute_logits", counting)
    request = request_of(prompt_of(30), prompt_logprobs=1, max_tokens=1)
    Loop(runner).run([request])
    on_device = isinstance(runner, CudaModelRunner)  # there 8 seats, and so many rows, were met
    assert sizes == ([8] * 5 if on_device else [1, 16, 16])
    check_prompt(pair, request)


def test_sampled_logprobs_are_transformers(pair, runner):
    request = request_of(prompt_of(9), logprobs=5, max_tokens=12)
    loop = Loop(runner)
    found = []
    loop.scheduler.add(request)
    while loop.scheduler.has_unfinished:
        plan = loop.scheduler.schedule()
        runner.launch(plan)
        output = runner.sample(plan.step_id).result(timeout=60)
        for update in loop.scheduler.update(output):
            found += update.logprobs
    theirs = pair.logprobs(request.token_ids)[request.num_prompt_tokens - 1 :]
    for row, entry in zip(theirs, found, strict=False):
        assert entry.logprob == pytest.approx(float(row.max()), abs=2e-4)
        assert [token_id for token_id, _ in entry.top] == row.topk(5).indices.tolist()


def greedy(pair: Pair, prompt: list[int], length: int, edit) -> list[int]:
    """transformers' logits, edited, step by step; ``edit(row, output)``."""
    output: list[int] = []
    for _ in range(length):
        row = pair.logprobs(prompt + output)[-1].clone()
        edit(row, output)
        output.append(int(row.argmax()))
    return output


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_bad_words_do_not_come(pair, runner, steps_in_flight):
    prompt = prompt_of(11, 3)
    free = greedy(pair, prompt, 16, lambda row, output: None)
    # Of one token, of two and of three, as they would come; with a bias on a token that ends one.
    words = ((free[0],), (free[3], free[4]), (free[7], free[8], free[9]), (prompt[-1], free[1]))
    bias = {free[4]: 0.25, free[9]: -0.5}

    def edit(row, output):
        for token_id, value in bias.items():
            row[token_id] += value
        for word in words:
            if output[len(output) - len(word) + 1 :] == list(word[:-1]):
                row[word[-1]] = -torch.inf

    expected = greedy(pair, prompt, 16, edit)
    assert expected != free
    loop = Loop(runner, max_steps_in_flight=steps_in_flight)
    banned = request_of(prompt, bad_word_ids=words, logit_bias=bias, max_tokens=16)
    beside = request_of(prompt, max_tokens=16)
    assert loop.run([banned, beside]) == [expected, free]


def test_only_allowed_tokens_come(pair, runner):
    prompt = prompt_of(6, 5)
    allowed = [3, 17, 50, 96]

    def edit(row, output):
        row[[i for i in range(VOCAB) if i not in allowed]] = -torch.inf

    request = request_of(prompt, allowed_token_ids=tuple(allowed), max_tokens=10)
    drawn = request_of(prompt, allowed_token_ids=tuple(allowed), max_tokens=10, temperature=1.0)
    outputs = Loop(runner).run([request, drawn])
    assert outputs[0] == greedy(pair, prompt, 10, edit)
    assert set(outputs[1]) <= set(allowed)


def test_penalties_and_least_lengths_are_transformers(pair, runner):
    prompt = prompt_of(12, 9)
    theirs = pair.theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=14,
        min_new_tokens=14,
        do_sample=False,
        repetition_penalty=1.4,
        pad_token_id=0,
    )
    request = request_of(
        prompt, frozenset({1}), repetition_penalty=1.4, min_tokens=14, max_tokens=14
    )
    assert Loop(runner).run([request]) == [theirs[0, len(prompt) :].tolist()]


def test_a_seed_gives_the_same_answer_in_any_company(runner):
    def drawn(prompt):
        return request_of(
            prompt, temperature=1.3, top_k=40, min_p=0.01, repetition_penalty=1.1, max_tokens=12
        )

    alone = Loop(runner).run([drawn(prompt_of(10))])
    together = Loop(runner).run([drawn(prompt_of(10, seed)) for seed in (5, 0, 6)])
    assert together[1] == alone[0]
