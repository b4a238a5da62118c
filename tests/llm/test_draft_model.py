"""A model that drafts for another, by its flag: the same answers, or a refusal that says why."""

import json

import pytest

from streamserve import LLM, SamplingParams
from streamserve.cli.model_source import box_path
from streamserve.errors import ConfigError
from tests.e2e.servers import SMALL
from tests.llm.conftest import SIZES

PROMPTS = ["Hello, my name is", "The capital of France is"]


def test_the_same_answers(llm):
    """The box drafts for itself: never wrong, and not worth it for long."""
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]
    config = {"method": "draft_model", "model": str(box_path()), "num_speculative_tokens": 3}
    with LLM(**SMALL, speculative_config=config) as drafted:
        outputs = drafted.generate(PROMPTS, params)
        stats = drafted._service.engine.stats().speculation
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_model_len": 1024}, "512 positions, fewer than max_model_len 1024"),
        ({"tensor_parallel_size": 2}, r"on a CPU, in one process, .* tensor_parallel_size 2"),
    ],
)
def test_a_model_that_cannot_draft_is_refused(flags, message, tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    given = {"model": str(tmp_path), "num_speculative_tokens": 3}
    with pytest.raises(ConfigError, match=message):
        LLM(speculative_config=given, **flags)


def test_another_vocabulary_is_refused(hub):
    given = {"model": "Qwen/Qwen2.5-1.5B-Instruct", "num_speculative_tokens": 3}
    with pytest.raises(ConfigError, match=r"another vocabulary: .* of 1024 tokens differ, and 64"):
        LLM(speculative_config=given, download_dir=str(hub), max_model_len=256)
