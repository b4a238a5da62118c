"""Grammars over a real (tiny) model, on the host's runner and a device's: no id that they forbid.

The engine drives them: two steps in flight, masks that come while the forward runs.
"""

from __future__ import annotations

import re
from functools import partial

import pytest

from streamserve.config import MAX_DRAFTING_ROWS
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.runner.build import build_runner, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner
from streamserve.runner.cuda.step_key import StepLadder
from tests.engine.fakes import NothingForced, collect, serving
from tests.runner.tiny_llama import MAX_LEN, memory_for, tiny_llama

VOCAB = 272  # rows behind the tokenizer's 258 ids are padding
PATTERN = "[a-z]{6} (yes|nö)"
CASES = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.5, "seed": 5, "top_p": 0.9},
    "edited": {"seed": 6, "presence_penalty": 1.5, "logit_bias": {97: 40.0}, "min_tokens": 14},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
}


@pytest.fixture(scope="module", params=["cpu", "naive on a device"])
def build(request, tmp_path_factory):
    backend, _, on_device = request.param.partition(" ")
    model = tiny_llama(tmp_path_factory.mktemp("model"), backend=backend, vocab_size=VOCAB)
    memory = memory_for(model, num_blocks=64, block_size=16)

    def build():
        caches = new_kv_cache(model.spec, memory, model.dtype, model.device, model.kernels)
        rows = MAX_DRAFTING_ROWS
        ladder = StepLadder(48, memory.max_num_seqs, max_num_sampled=rows)
        builder = (
            partial(build_cuda_runner, ladder=ladder)
            if on_device
            else partial(build_runner, max_num_sampled=rows)
        )
        return builder(model, memory, max_num_batched_tokens=48, kv_caches=caches)[0]

    return build


async def run(build, max_steps_in_flight: int, with_free: bool, *, pattern=PATTERN, may_draft=True):
    """Answers by name, ``free`` has no grammar; and how many tokens were forced."""
    output = StructuredOutput(kind=GrammarKind.REGEX, text=pattern)
    async with serving(
        build(),
        scheduler_class=Scheduler if may_draft else NothingForced,
        tokenizer=ByteTokenizer(),
        max_model_len=MAX_LEN,
        max_num_batched_tokens=48,
        max_steps_in_flight=max_steps_in_flight,
        vocab_size=VOCAB,
    ) as harness:
        await harness.engine.prepare(SamplingParams(structured_output=output))
        streams = {
            name: harness.submit(name, structured_output=output, max_tokens=40, **params)
            for name, params in CASES.items()
        }
        if with_free:
            streams["free"] = harness.submit("free", seed=1, max_tokens=20, ignore_eos=True)
        answers = {name: await collect(stream) for name, stream in streams.items()}
        return answers, harness.engine.stats().speculation


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
async def test_answers_follow_the_grammar_in_any_company(build, max_steps_in_flight):
    answers, _ = await run(build, max_steps_in_flight, with_free=True)
    free = answers.pop("free")
    assert len(free.token_ids) == 20
    for name, answer in answers.items():
        assert re.fullmatch(PATTERN, answer.text), (name, answer.text)
        assert answer.finish_reason is FinishReason.STOP
    assert answers["greedy"].text == answers["logprobs"].text
    assert answers["edited"].text.startswith("a")
    # Logprobs are the model's own: some of the likeliest tokens were forbidden.
    entries = answers["logprobs"].logprobs
    assert any(entry.token_id != entry.top[0][0] for entry in entries)
    without, _ = await run(build, max_steps_in_flight, with_free=False)
    assert {name: answer.text for name, answer in without.items()} == {
        name: answer.text for name, answer in answers.items()
    }


async def test_forced_tokens_are_what_would_have_come_one_by_one(build):
    pattern = "kind: (left|right); [0-9] yes"
    one_by_one, stats = await run(build, 1, True, pattern=pattern, may_draft=False)
    assert stats.num_drafts == 0
    answers, stats = await run(build, 2, True, pattern=pattern)
    assert stats.num_forced_tokens >= 40
    for name, answer in answers.items():
        expected = one_by_one[name]
        assert answer.token_ids == expected.token_ids
        assert answer.finish_reason == expected.finish_reason
        for entry, other in zip(answer.logprobs or (), expected.logprobs or (), strict=True):
            assert entry.token_id == other.token_id
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert re.fullmatch(pattern, answers["greedy"].text)
