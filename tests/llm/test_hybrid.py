"""A model whose layers keep states, through the whole engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from streamserve import LLM, SamplingParams
from streamserve.errors import ConfigError, InvalidParameterError
from tests.llm.conftest import SIZES, VOCAB_SIZE
from tools.make_checkpoint import make_tokenizer

SMALL = {"dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 128}
CONFIG = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    **SIZES,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "eos_token_id": VOCAB_SIZE - 1,
}
PROMPT = "The capital of France is a town on a river, and so is that of England, but not Spain's"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer: the weights are drawn."""
    directory = tmp_path_factory.mktemp("hybrid")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer(VOCAB_SIZE).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def hybrid(directory: Path) -> Iterator[LLM]:
    with LLM(str(directory), load_format="dummy", **SMALL) as llm:
        yield llm


def test_answers_from_the_cache_are_those_without_it(hybrid):
    first, again = (hybrid.generate(PROMPT, GREEDY)[0] for _ in range(2))
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    turn = PROMPT + first.outputs[0].text
    cached = hybrid.generate(turn, GREEDY)[0].outputs[0].token_ids
    uncached = hybrid.generate(turn, replace(GREEDY, prompt_logprobs=0))
    assert cached == uncached[0].outputs[0].token_ids
    stats = hybrid._service.engine.stats()
    assert stats.prefix_hit_tokens > 0
    assert stats.num_kept_states > 0


def test_vectors_do_not_depend_on_what_was_cached(hybrid):
    before, after = (hybrid.embed(PROMPT + " or Rome's")[0].outputs.embedding for _ in range(2))
    assert before == pytest.approx(after, abs=1e-5)


def test_beam_search_is_refused(hybrid):
    params = SamplingParams(use_beam_search=True, best_of=2, temperature=0.0, max_tokens=4)
    with pytest.raises(InvalidParameterError, match="use_beam_search may not be true"):
        hybrid.generate(PROMPT, params)


def test_what_states_do_not_go_with_is_refused(directory):
    match = "tensor_parallel_size must not be given for a model whose layers keep"
    with pytest.raises(ConfigError, match=match):
        LLM(str(directory), load_format="dummy", **SMALL, tensor_parallel_size=2)


def test_answers_with_drafts_are_those_without_them(hybrid, directory):
    """Of three tokens, which is why what came before comes again, mostly."""
    params = replace(GREEDY, max_tokens=24, logit_bias=dict.fromkeys((70, 71, 72), 50.0))
    prompts = [PROMPT, "Spain Spain", PROMPT + " or Rome's"]
    expected = [one.outputs[0].token_ids for one in hybrid.generate(prompts, params)]
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    flags = {"load_format": "dummy", "speculative_config": speculative}
    with LLM(str(directory), **SMALL, **flags) as drafting:
        drafting._service.engine._scheduler._speculator._model = None  # it tries them all
        found = drafting.generate(prompts, params)
        assert [one.outputs[0].token_ids for one in found] == expected
        stats = drafting._service.engine.stats().speculation
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 0


def test_a_model_that_keeps_states_drafts_for_nobody(directory):
    given = {"method": "draft_model", "model": str(directory), "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match="must be a model whose layers keep no state"):
        LLM(dtype="float32", speculative_config=given, max_model_len=128)
