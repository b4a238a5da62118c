"""Grammars over a real (tiny) model, on the host's runner and a device's: no id that they forbid.

The engine drives them: two steps in flight, masks that come while the forward runs.
"""

from __future__ import annotations

import re
from functools import partial

import pytest

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.runner.build import build_runner, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner
from streamserve.runner.cuda.step_key import StepLadder
from tests.engine.fakes import collect, serving
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
        ladder = StepLadder(48, memory.max_num_seqs)
        builder = partial(build_cuda_runner, ladder=ladder) if on_device else build_runner
        return builder(model, memory, max_num_batched_tokens=48, kv_caches=caches)[0]

    return build


async def run(build, max_steps_in_flight: int, with_free: bool):
    """Texts and logprobs by name; ``free`` has no grammar."""
    output = StructuredOutput(kind=GrammarKind.REGEX, text=PATTERN)
    async with serving(
        build(),
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
        return {name: await collect(stream) for name, stream in streams.items()}


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
async def test_answers_follow_the_grammar_in_any_company(build, max_steps_in_flight):
    answers = await run(build, max_steps_in_flight, with_free=True)
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
    without = await run(build, max_steps_in_flight, with_free=False)
    assert {name: answer.text for name, answer in without.items()} == {
        name: answer.text for name, answer in answers.items()
    }
